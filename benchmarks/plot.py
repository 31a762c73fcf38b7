"""The figures. Every axis has a unit; series differ by marker and dash, not by colour alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

from benchmarks.cases import DTYPES
from benchmarks.contenders import BASELINE
from benchmarks.operations import BEYOND_TORCH
from benchmarks.results import Record, Results

try:  # Figure alone needs no display and changes no global state, unlike pyplot
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator
except ImportError:
    Figure = None  # type: ignore[assignment, misc]

_MARKERS = dict(zip(DTYPES, ("o", "s", "^", "D")))
_FILLS = dict(zip(DTYPES, ("black", "white", "white", "#bbbbbb")))
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
_SHADES = ("black", "#555555", "#1f5f99", "#99551f", "#2c7a4b", "#7a2c6b")
_STATES = {"unclipped": "nothing to clip", "clipped": "all clipped"}


def available() -> bool:
    """Tell whether matplotlib can be imported."""
    return Figure is not None


def _is_in_torch(record: Record) -> bool:
    return record.op not in BEYOND_TORCH


def speedups(results: Results, path: Path, wanted: Callable[[Record], bool] = _is_in_torch) -> bool:
    """Draw the speed-up over torch.nn.utils, a panel per implementation and operation.

    Args:
        results: what failed the gate, and torch.nn.utils itself, is left out.
        path: of the PNG.
        wanted: tells which of the other records to draw. Default: the functions that torch.nn.utils has.

    Returns:
        Whether there was anything to draw, and matplotlib to draw it.
    """
    shown = [
        r for r in results.records if r.impl != BASELINE and r.speedup_vs_torch is not None and wanted(r)
    ]
    caption = "speed-up over torch (times, log scale); right of the dashed line is faster"
    return _dots(results, shown, path, caption, value=lambda r: r.speedup_vs_torch, line=lambda r: 1.0)


def speedups_beyond(results: Results, path: Path) -> bool:
    """Draw the speed-up over torch's operations where torch.nn.utils has no function; see speedups."""
    return speedups(results, path, lambda record: not _is_in_torch(record))


def bandwidths(results: Results, path: Path) -> bool:
    """Draw the bandwidth that each implementation achieves against the one measured; see speedups."""
    shown = [r for r in results.records if r.gbps is not None and _is_in_torch(r)]
    caption = (
        "achieved bandwidth: bytes that have to move, over time (GB/s, log scale); "
        "dashed: the bound measured in this run"
    )

    def bound(record: Record) -> float | None:
        if not record.gbps or not record.p50_us or not record.bound_us:
            return None  # a few bytes have a bound that rounds to nothing
        return record.gbps * record.p50_us / record.bound_us

    return _dots(results, shown, path, caption, value=lambda r: r.gbps, line=bound)


Value = Callable[[Record], "float | None"]


def _dots(
    results: Results, shown: Sequence[Record], path: Path, caption: str, *, value: Value, line: Value
) -> bool:
    """Draw a grid of panels: an implementation per row, an operation per column, a line per case."""
    if not shown or not available():
        return False
    impls = list(dict.fromkeys(r.impl for r in shown))
    calls = list(dict.fromkeys((r.op, r.state) for r in shown))
    cases = list(dict.fromkeys(r.case for r in shown))
    dtypes = [dtype for dtype in DTYPES if any(r.dtype == dtype for r in shown)]
    height = 0.7 + 0.1 * len(cases) * max(2, len(dtypes))
    figure = Figure(figsize=(1.9 + 2.1 * len(calls), 1.3 + height * len(impls)), layout="constrained")
    axes = figure.subplots(len(impls), len(calls), squeeze=False, sharex=True, sharey=True)
    for impl, row in zip(impls, axes):
        for (op, state), axis in zip(calls, row):
            panel = [r for r in shown if (r.impl, r.op, r.state) == (impl, op, state)]
            _dots_of_panel(axis, panel, cases, dtypes, value)
            limits = [at for at in map(line, panel) if at]
            if limits:
                axis.axvline(max(limits), color="black", linestyle="--", linewidth=1.0)
            axis.set_title(f"{impl}\n{op}\n{_STATES[state]}", fontsize=7)
            _log_axis(axis)
    axes[0, 0].set_yticks(range(len(cases)), cases)
    axes[0, 0].set_ylim(len(cases) - 0.5, -0.5)  # first case on top; shared by every panel
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(dtypes), fontsize=8)
    figure.suptitle(results.title, fontsize=9, x=0.01, ha="left")
    figure.supxlabel(caption, fontsize=8)
    _save(figure, path, results)
    return True


def _dots_of_panel(
    axis: Any, panel: Sequence[Record], cases: Sequence[str], dtypes: Sequence[str], value: Value
) -> None:
    for number, dtype in enumerate(dtypes):
        drawn = [r for r in panel if r.dtype == dtype]
        # Four dtypes of one case would lie on each other, so each gets its own height.
        shift = (number - (len(dtypes) - 1) / 2) * 0.8 / len(dtypes)
        axis.plot(
            [value(r) for r in drawn],
            [cases.index(r.case) + shift for r in drawn],
            linestyle="none",
            marker=_MARKERS[dtype],
            markersize=4.5,
            color="black",
            markerfacecolor=_FILLS[dtype],
            label=dtype,
        )
    for between in range(1, len(cases)):
        axis.axhline(between - 0.5, color="#cccccc", linewidth=0.6)


def _log_axis(axis: Any) -> None:
    axis.set_xscale("log")
    axis.grid(axis="x", which="both", color="#eeeeee")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.tick_params(labelsize=7, labelbottom=True)


def host_times(results: Results, path: Path) -> bool:
    """Draw the host time of a call against the number of tensors; see speedups."""
    if not results.host or not available():
        return False
    curves = {
        impl: [(h.tensors, h.p50_us) for h in results.host if h.impl == impl]
        for impl in dict.fromkeys(h.impl for h in results.host)
    }
    figure = _call_times(curves, f"{results.title}: host time of one call, warm", "us")
    figure.axes[0].set_xlabel("one-element tensors in the list (log scale)", fontsize=9)
    _save(figure, path, results)
    return True


def sharded_times(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, path: Path) -> bool:
    """Draw the milliseconds of a call against the number of DTensors, a curve per name.

    Returns:
        False if nothing was drawn: matplotlib is not installed, or no curve has a point.
    """
    if not available() or not any(curves.values()):
        return False
    figure = _call_times(curves, title, "ms")
    figure.axes[0].set_xlabel("DTensors in the list (log scale)", fontsize=9)
    _save(figure, path)
    return True


def _call_times(curves: Mapping[str, Sequence[tuple[int, float]]], title: str, unit: str) -> Any:
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axis = figure.subplots()
    for number, (name, points) in enumerate(curves.items()):
        axis.plot(
            [count for count, _ in points],
            [time for _, time in points],
            linestyle=_LINES[number % len(_LINES)],
            marker="os^Dvx"[number % 6],
            color=_SHADES[number % len(_SHADES)],
            label=name,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(which="both", color="#e8e8e8")
    axis.set_xticks(sorted({count for points in curves.values() for count, _ in points}))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.set_ylabel(f"time until clip_grad_norm_ returns ({unit}, log scale)", fontsize=9)
    axis.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def training(
    losses: Mapping[str, Sequence[float]],
    norms: Mapping[str, Sequence[float]],
    max_norm: float,
    title: str,
    path: Path,
) -> bool:
    """Draw loss and gradient norm of several runs over the steps; return False without matplotlib.

    Args:
        losses: name of the run to the training loss of each step, in nats per byte.
        norms: name of the run to the gradient norm before clipping of each step.
        max_norm: drawn as a line; above it gradients were clipped.
        title: what the picture shows, with the difference between the curves.
        path: of the PNG.
    """
    if not available():
        return False
    figure = Figure(figsize=(8, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axis, curves in ((top, losses), (bottom, norms)):
        for number, (name, values) in enumerate(curves.items()):
            # A thick pale line under thin dashed ones: all stay visible where they coincide.
            style: dict[str, Any] = (
                {"color": "#c9b27c", "linewidth": 4.0}
                if number == 0
                else {"color": _SHADES[number % 6], "linewidth": 1.0, "linestyle": _LINES[number % 6]}
            )
            axis.plot(range(1, len(values) + 1), values, label=name, **style)
        axis.grid(alpha=0.3)
    top.set_title(title, fontsize=9)
    top.set_ylabel("training loss (nats per byte)")
    bottom.axhline(max_norm, color="black", linestyle=":", label=f"max_norm = {max_norm:g}")
    bottom.set_ylabel("gradient norm before clipping")
    bottom.set_yscale("log")
    bottom.yaxis.set_major_formatter("{x:g}")
    low, high = bottom.get_ylim()
    bottom.yaxis.set_minor_formatter("{x:g}" if high < 100 * low else "")  # more would lie on each other
    bottom.set_xlabel("step")
    top.legend()
    bottom.legend()
    _save(figure, path)
    return True


def draw_all(results: Results, path: Path) -> list[Path]:
    """Draw speed-ups at ``path`` and the other figures beside it; return what was drawn."""
    drawings: dict[str, Callable[[Results, Path], bool]] = {
        "": speedups,
        "-beyond": speedups_beyond,
        "-bandwidth": bandwidths,
        "-host": host_times,
    }
    pictures = {path.with_name(f"{path.stem}{suffix}.png"): draw for suffix, draw in drawings.items()}
    return [picture for picture, draw in pictures.items() if draw(results, picture)]


def fingerprint(results: Results) -> str:
    """Return what a picture made from these results carries, so that a stale one is found."""
    return f"{crc32(json.dumps(asdict(results), sort_keys=True).encode()):08x}"


def _save(figure: Any, path: Path, results: Results | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {} if results is None else {"Description": f"results {fingerprint(results)}"}
    figure.savefig(path, dpi=130, facecolor="white", metadata=metadata)
