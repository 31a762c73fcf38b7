"""What people see of results: the progress bar, the table in the terminal, README's numbers and figures.

``python -m benchmarks.report`` writes the part of README.md between its two markers, the index
benchmarks/results/README.md, and the figures, all from the committed results files. A test fails when any
of them does not match the files. ``python -m benchmarks.report FILE ...`` prints every row of files.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from types import TracebackType

import torch

from benchmarks import plot
from benchmarks.cases import STEP, Case, gradient_bytes
from benchmarks.contenders import BASELINE, is_ours
from benchmarks.results import (
    HostTime,
    Record,
    Results,
    Training,
    host_costs,
    is_training,
    training_file_name,
)

try:
    from tqdm import tqdm
except ImportError:  # measuring needs torch alone, so that it runs on any machine as it is
    tqdm = None

# ---------------------------------------------------------------- progress bar


class Progress:
    """A bar with the time left, on stderr if that is a terminal, so that stdout holds results only.

    Args:
        total: amount of work, in any unit that is roughly proportional to time.
    """

    def __init__(self, total: float) -> None:
        self._bar = tqdm and tqdm(
            total=total,
            bar_format="{desc} {percentage:3.0f}% |{bar:30}| {elapsed} elapsed, {remaining} left",
            disable=None,  # that is: unless stderr is a terminal
            leave=False,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def label(self, text: str) -> None:
        """Say what is being worked on."""
        if self._bar is not None:
            self._bar.set_description_str(text)

    def advance(self, amount: float) -> None:
        """Count work as done."""
        if self._bar is not None:
            self._bar.update(amount)

    def write(self, text: str) -> None:
        """Print a result above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)


# ---------------------------------------------------------------- table

HEADER = (
    f"{'implementation':<24} {'p50':>9} {'p20-p80':>15} {'bound':>7} {'speed-up':>8} {'p20-p80':>13}"
    f" {'error':>8}"
)
EXPLANATION = (
    "p50, p20-p80: time of one call. bound: share of the speed at which this machine moves the bytes\n"
    "that have to move (what fits in cache may exceed 100 %). speed-up: over torch.nn.utils, median of\n"
    "interleaved pairs, and their p20-p80. error: largest relative error against float64, beyond one\n"
    "rounding."
)


def case_title(case: Case, dtype: str, device: torch.device) -> str:
    """Return the line above the rows of one case and dtype."""
    size = gradient_bytes(case, dtype)
    amount = f"{case.tensors} tensors, {case.numel / 1e6:.4g} M elements, {size / 1e6:.4g} MB"
    return f"{case.name}, {dtype}, {device.type}: {amount}"


def every_row(results: Results) -> Iterator[str]:
    """Yield the lines of the table with all records and host times of a file."""
    yield HEADER
    for _, of_case in groupby(results.records, key=lambda r: (r.case, r.dtype)):
        records = list(of_case)
        yield from ("", f"{records[0].case}, {records[0].dtype}, {records[0].device}")
        for _, of_operation in groupby(records, key=lambda r: (r.op, r.state)):
            yield from rows(list(of_operation))
    yield from ("", EXPLANATION)
    if results.host:
        yield from ("", *host_rows(results.host))


def rows(records: Sequence[Record]) -> list[str]:
    """Return the rows of one operation; what failed the gate gets its error and no speed-up."""
    lines = [f"{records[0].op}:{records[0].state}"]
    for r in records:
        times = "-" if r.p20_us is None else f"{_duration(r.p20_us)}-{_duration(r.p80_us)}"
        ratios = "-" if r.speedup_p20 is None else f"{_ratio(r.speedup_p20)}-{_ratio(r.speedup_p80)}"
        error = "-" if r.max_rel_error is None else f"{r.max_rel_error:.1e}"
        lines.append(
            f"  {r.impl:<22} {_duration(r.p50_us):>9} {times:>15} {_percent(r.pct_of_bound):>7}"
            f" {_ratio(r.speedup_vs_torch):>8} {ratios:>13} {error:>8}"
        )
        if r.problem is not None:
            lines.append(f"{'':<25}NOT OK: {r.problem}"[:100])
    return lines


def host_rows(times: Sequence[HostTime]) -> list[str]:
    """Return the table of host times, one row per implementation."""
    counts = list(dict.fromkeys(t.tensors for t in times))
    costs = host_costs(times)
    lines = [
        "host time of clip_grad_norm_, warm, for a number of one-element tensors",
        f"{'':<24}" + "".join(f"{count:>10,}" for count in counts) + f"{'each further':>16}",
    ]
    for impl in dict.fromkeys(t.impl for t in times):
        cells = "".join(f"{_duration(t.p50_us):>10}" for t in times if t.impl == impl)
        further = f"{costs[impl].us_per_further:.3f} us" if impl in costs else "-"
        lines.append(f"{impl:<24}{cells}{further:>16}")
    return lines


# ---------------------------------------------------------------- README and index

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDER = Path(__file__).parent / "results"
BEGIN = "<!-- begin: made by python -m benchmarks.report, not by hand -->\n"
END = "<!-- end: python -m benchmarks.report -->"
_DESCRIPTION = "Write README's numbers and figures, and the index of the results, from the committed files."
# README shows what most people train in; the files have the rest.
_SHOWN_DTYPES = ("float32", "bfloat16")
_COLUMNS = {
    "clip_grad_norm_:unclipped": "norm, nothing to clip",
    "clip_grad_norm_:clipped": "norm, clipping",
    "clip_grad_value_:unclipped": "value, nothing exceeds",
    "clip_grad_value_:clipped": "value, all exceed",
    "get_total_norm:unclipped": "`get_total_norm`",
}


def load(folder: Path = FOLDER) -> dict[str, Results]:
    """Return the results files by stem, those of GPUs first."""
    files = {p.stem: Results.load(p) for p in sorted(folder.glob("*.jsonl")) if not is_training(p)}
    return dict(sorted(files.items(), key=lambda item: item[1].machine["gpu"] is None))


def default_backend(results: Results) -> str | None:
    """Return the first of our backends: the one that handles the device unless another is named."""
    return next((r.impl for r in results.records if is_ours(r.impl)), None)


def readme_block(files: dict[str, Results], folder: Path = FOLDER) -> str:
    """Return what stands between the markers of README.md."""
    parts = []
    for stem, results in files.items():
        where = f"benchmarks/results/{stem}"
        parts += [*_heading(results), "", *_table(results, _SHOWN_DTYPES), "", *_notes(results)]
        parts += [training_sentence(folder / training_file_name(stem)), ""]
        parts += [f"![speed-up over torch.nn.utils, {results.title}]({where}-summary.png)", ""]
    if not any(results.machine["gpu"] for results in files.values()):
        parts += ["There is no results file of a GPU yet.", ""]
    return _text(parts)


def index(files: dict[str, Results], folder: Path = FOLDER) -> str:
    """Return benchmarks/results/README.md: the machine, the notes and the figures of every file."""
    parts = [
        "# Results",
        "",
        "Made by `python -m benchmarks.report` from the files beside it, not by hand. A file has one JSON",
        "object per line: the machine, then the records; `python -m benchmarks.report FILE` prints them",
        "as a table.",
        "",
    ]
    for stem, results in files.items():
        parts += [f"## [{results.title}]({stem}.jsonl)", "", *_heading(results), "", *_notes(results), ""]
        parts += [f"![speed-up]({stem}.png)", "", f"![bandwidth]({stem}-bandwidth.png)", ""]
        if results.host:
            parts += [f"![host time]({stem}-host.png)", ""]
        training = folder / training_file_name(stem)
        parts += (
            [training_sentence(training), f"![training]({training.stem}.png)", ""]
            if training.exists()
            else []
        )
    return _text(parts)


def draw(stem: str, results: Results, folder: Path = FOLDER) -> None:
    """Draw the figures of one file."""
    ours = default_backend(results)
    plot.speedups(results, folder / f"{stem}-summary.png", [ours] if ours else None)
    plot.draw_all(results, folder / f"{stem}.png")


def replaced(text: str, block: str) -> str:
    """Return README's text with another block between the markers.

    Raises:
        ValueError: there is no pair of markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README.name} has no pair of markers {BEGIN.strip()} and {END}")
    return f"{before}{begin}{block}{end}{after}"


def _heading(results: Results) -> Iterator[str]:
    block = results.machine
    device = block["cpu"]
    if block["gpu"]:
        device = f"{block['gpu']}, driver {block['driver']}, CUDA {block['cuda']}"
    yield f"**{device}**, {block['cores']} CPU cores, torch {block['torch']}, commit {block['commit']},"
    yield f"{block['date']}. Memory was read at {block['read_gbps']:.1f} GB/s, and read and written in place"
    yield f"at {block['inplace_gbps']:.1f} GB/s, medians of the run."


def _table(results: Results, dtypes: Sequence[str]) -> Iterator[str]:
    ours = default_backend(results)
    yield f"Speed-up of `{ours}` over `{BASELINE}`{_repeats(results.records)}; in brackets,"
    yield "the share of the speed at which this memory moves the bytes that have to move (what fits in"
    yield "cache may exceed it)."
    yield ""
    yield "| case | tensors | gradients | " + " | ".join(_COLUMNS.values()) + " |"
    yield "|---|---|---|" + "---|" * len(_COLUMNS)
    rows = {(r.case, r.dtype): r for r in results.records if r.dtype in dtypes}
    found = {(r.case, r.dtype, f"{r.op}:{r.state}"): r for r in results.records if r.impl == ours}
    for (case, dtype), record in rows.items():
        cells = [_cell(found.get((case, dtype, label))) for label in _COLUMNS]
        size = f"{_amount(record.bytes)} {dtype}"
        yield f"| {case} | {record.tensors:,} | {size} | " + " | ".join(cells) + " |"


def _cell(record: Record | None) -> str:
    if record is None:
        return "not measured"
    if record.speedup_vs_torch is None:
        return "wrong" if not record.ok else "not measured"
    return f"{_ratio(record.speedup_vs_torch)} ({_percent(record.pct_of_bound)})"


def _notes(results: Results) -> Iterator[str]:
    costs = host_costs(results.host)
    ours = default_backend(results)
    if ours in costs and BASELINE in costs:
        us, torch_us = costs[ours], costs[BASELINE]
        yield f"One `clip_grad_norm_` call takes the host {us.us_for_300:.3g} µs for 300 one-element tensors"
        yield f"and {us.us_per_further:.2g} µs for each further one; `{BASELINE}` takes"
        yield f"{torch_us.us_for_300:.3g} µs and {torch_us.us_per_further:.2g} µs."
        yield ""
    steps = [r for r in results.records if r.impl == ours and r.op.endswith(STEP) and r.speedup_vs_torch]
    for state, of_state in groupby(sorted(steps, key=lambda r: r.state), key=lambda r: r.state):
        ratios = [f"{_ratio(r.speedup_vs_torch)} on {r.case} in {r.dtype}" for r in of_state]
        yield f"Clipping ({state}) and AdamW's step together, on new gradients: {', '.join(ratios)}."
        yield ""
    wrong = {(r.case, r.dtype): r.problem for r in results.records if r.impl == BASELINE and not r.ok}
    for (case, dtype), problem in wrong.items():
        yield f"`{BASELINE}` itself is wrong on {case} in {dtype}: {problem}. It stays the baseline."
        yield ""
    for name, peer in results.machine.get("peers", {}).items():
        yield f"`{name}` {peer['version']}: {peer['note']}."
        yield ""
    unmeasured: dict[tuple[str, str], list[str]] = {}
    for skipped in results.skipped:
        unmeasured.setdefault((skipped.case, skipped.reason), []).append(skipped.dtype)
    for (case, reason), dtypes in unmeasured.items():
        yield f"Not measured: {case} in {', '.join(dtypes)}: {reason}."
        yield ""


def _text(lines: Sequence[str]) -> str:
    """Return the lines as Markdown, where several empty ones are one."""
    return re.sub("\n{3,}", "\n\n", "\n".join(lines))


def _repeats(records: Sequence[Record]) -> str:
    counts = [r.repeats for r in records if r.repeats is not None]
    return f", median of {min(counts)} to {max(counts)} interleaved pairs" if counts else ", median of pairs"


def training_sentence(path: Path) -> str:
    """Return what a training file says, in words; nothing if there is no such file."""
    if not path.exists():
        return ""
    found = Training.load(path)
    size = f"{found.parameters / 1e6:.3g} M parameters, {found.dtype}"
    took = ", ".join(
        f"{1e3 * median(run.clip_ms):,.0f} µs ({run.clip_share:.2%}) by `{run.name}`" for run in found.clipped
    )
    return (
        f"Training {found.model} ({size}) for {found.steps} steps with max_norm {found.max_norm:g}, "
        f"clipping took this much of a step: {took}. As means over a fifteenth of the steps, "
        f"losses differ by {found.difference():.1e} at most.\n"
    )


# ---------------------------------------------------------------- formats


def _duration(us: float | None) -> str:
    if us is None:
        return "-"
    value, unit = (us, "us") if us < 1e3 else (us / 1e3, "ms") if us < 1e6 else (us / 1e6, "s")
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def _percent(percent: float | None) -> str:
    if percent is None:
        return "-"
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %" if percent >= 0.1 else "< 0.1 %"


def _amount(size: int) -> str:
    for unit, bytes_of_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.3g} {unit}"
    return f"{size} B"


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Write README.md's block, the index and the figures, or print files; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=_DESCRIPTION)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="print every row of these files")
    paths: list[Path] = parser.parse_args(argv).files
    return _print_rows(paths) if paths else _write()


def _print_rows(paths: Sequence[Path]) -> int:
    for path in paths:
        try:
            results = Results.load(path)
        except ValueError as error:
            print(f"python -m benchmarks.report: {error}", file=sys.stderr)
            return 2
        print(f"{results.title}\n" + "\n".join(every_row(results)))
    return 0


def _write() -> int:
    if not plot.available():
        print("python -m benchmarks.report: needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return 2
    files = load()
    README.write_text(replaced(README.read_text(), readme_block(files)))
    (FOLDER / "README.md").write_text(index(files))
    for stem, results in files.items():
        draw(stem, results)
    print(f"README.md, benchmarks/results/README.md and the figures are made from {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
