"""Plots, drawn to be read: units on every axis, told apart by hatch and dash, not by colour alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.implementations import BASELINE
from benchmarks.suite import Record

try:  # Figure alone needs no display and changes no global state, unlike pyplot
    from matplotlib.figure import Figure
except ImportError:
    Figure = None  # type: ignore[assignment, misc]

_HATCHES = ("", "///", "...", "xx", "\\\\\\")
_LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # keeps the line at 1 off the digits
_FILLS = ("#4c72b0", "#c9d7ea", "#8da0cb", "#e8e8e8", "#a0a0a0")


def available() -> bool:
    """Tell whether matplotlib can be imported."""
    return Figure is not None


def speedups(machine: Mapping[str, Any], records: Sequence[Record], path: Path) -> bool:
    """Draw the speed-up over torch.nn.utils, a panel per case and dtype.

    Args:
        machine: the machine block.
        records: what failed the gate, and torch.nn.utils itself, is left out.
        path: of the PNG.

    Returns:
        Whether there was anything to draw, and matplotlib to draw it.
    """
    shown = [r for r in records if r.impl != BASELINE and r.speedup_vs_torch is not None]
    if not shown or not available():
        return False
    panels = list(dict.fromkeys((r.case, r.dtype) for r in shown))
    calls = list(dict.fromkeys((r.op, r.state) for r in shown))
    impls = list(dict.fromkeys(r.impl for r in shown))
    columns = min(len({dtype for _, dtype in panels}), 3)
    rows = -(-len(panels) // columns)
    height = 0.8 + 0.2 * len(calls) * (len(impls) + 0.6)
    figure = Figure(figsize=(2.4 + 3.6 * columns, 1.1 + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    thickness = 0.8 / len(impls)
    for axis, panel in zip(axes.flat, panels):
        for number, impl in enumerate(impls):
            bars = [r for r in shown if (r.case, r.dtype) == panel and r.impl == impl]
            shift = (number - (len(impls) - 1) / 2) * thickness
            drawn = axis.barh(
                [calls.index((r.op, r.state)) + shift for r in bars],
                [r.speedup_vs_torch for r in bars],
                thickness,
                label=impl,
                color=_FILLS[number % len(_FILLS)],
                hatch=_HATCHES[number % len(_HATCHES)],
                edgecolor="black",
                linewidth=0.6,
            )
            values = [f"{r.speedup_vs_torch:.2f}x" for r in bars]
            axis.bar_label(drawn, values, padding=3, fontsize=8, bbox=_LABEL_BOX)
        axis.axvline(1.0, color="black", linestyle="--", linewidth=1.0)
        axis.set_title(", ".join(panel), fontsize=9)
        axis.tick_params(labelbottom=True, labelsize=8)
    axes[0, 0].set_yticks(range(len(calls)), [f"{op}, {state}" for op, state in calls])
    axes[0, 0].set_ylim(len(calls) - 0.5, -0.5)  # first call on top; shared by every panel
    axes[0, 0].set_xlim(0.0, 1.2 * max(r.speedup_vs_torch or 0.0 for r in shown))
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{machine['gpu'] or machine['cpu']}, torch {machine['torch']}", fontsize=10)
    caption = "speed-up over torch.nn.utils (times)\nright of the dashed line is faster"
    for axis in axes[-1]:
        axis.set_xlabel(caption, fontsize=8)
    _save(figure, path)
    return True


def training(
    losses: Mapping[str, Sequence[float]],
    norms: Mapping[str, Sequence[float]],
    max_norm: float,
    path: Path,
) -> bool:
    """Draw loss and gradient norm of several runs over the steps; return False without matplotlib.

    Args:
        losses: name of the run to the training loss of each step, in nats per byte.
        norms: name of the run to the gradient norm before clipping of each step.
        max_norm: drawn as a line; above it gradients were clipped.
        path: of the PNG.
    """
    if not available():
        return False
    figure = Figure(figsize=(8, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    # A wide pale line under a thin dashed one: both stay visible where they coincide.
    styles = ({"color": "#c9b27c", "linewidth": 4.0}, {"color": "black", "linewidth": 1.0, "linestyle": "--"})
    for axis, curves in ((top, losses), (bottom, norms)):
        for (name, values), style in zip(curves.items(), styles):
            axis.plot(range(1, len(values) + 1), values, label=name, **style)
        axis.grid(alpha=0.3)
    top.set_ylabel("training loss (nats per byte)")
    bottom.axhline(max_norm, color="black", linestyle=":", label=f"max_norm = {max_norm:g}")
    bottom.set_ylabel("gradient norm before clipping")
    bottom.set_yscale("log")
    bottom.yaxis.set_major_formatter("{x:g}")
    bottom.yaxis.set_minor_formatter("{x:g}")
    bottom.set_xlabel("step")
    top.legend()
    bottom.legend()
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, facecolor="white")
