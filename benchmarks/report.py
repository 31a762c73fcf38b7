"""``python -m benchmarks.report``: README's numbers and figures, made from the committed results files.

Writes the part of README.md between its two markers, the index benchmarks/results/README.md, and the
figures beside the files. A test fails when any of them does not match the files.
``python -m benchmarks.report FILE ...`` prints every row of results files instead.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import host, plot, table, training_results
from benchmarks.implementations import BASELINE, OURS
from benchmarks.operations import OPERATIONS
from benchmarks.results import Record, Results

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
    files = {
        p.stem: Results.load(p) for p in sorted(folder.glob("*.jsonl")) if not training_results.is_one(p)
    }
    return dict(sorted(files.items(), key=lambda item: item[1].machine["gpu"] is None))


def serving(results: Results) -> str | None:
    """Return the backend that serves the device by default: the first of ours, which are in that order."""
    return next((r.impl for r in results.records if r.impl.startswith(OURS)), None)


def readme_block(files: dict[str, Results], folder: Path = FOLDER) -> str:
    """Return what stands between the markers of README.md."""
    parts = []
    for stem, results in files.items():
        where = f"benchmarks/results/{stem}"
        parts += [*_heading(results), "", *_table(results, _SHOWN_DTYPES), "", *_notes(results)]
        parts += [*_training(folder / training_results.file_name(stem)), ""]
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
        training = folder / training_results.file_name(stem)
        parts += [*_training(training), f"![training]({training.stem}.png)", ""] if training.exists() else []
    return _text(parts)


def draw(stem: str, results: Results, folder: Path = FOLDER) -> None:
    """Draw the figures of one file."""
    ours = serving(results)
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
        print(f"{results.title}\n" + "\n".join(table.every_row(results)))
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


def _heading(results: Results) -> Iterator[str]:
    block = results.machine
    device = block["cpu"]
    if block["gpu"]:
        device = f"{block['gpu']}, driver {block['driver']}, CUDA {block['cuda']}"
    yield f"**{device}**, {block['cores']} CPU cores, torch {block['torch']}, commit {block['commit']},"
    yield f"{block['date']}. Memory was read at {block['read_gbps']:.1f} GB/s, and read and written in place"
    yield f"at {block['inplace_gbps']:.1f} GB/s, medians of the run."


def _table(results: Results, dtypes: Sequence[str]) -> Iterator[str]:
    ours = serving(results)
    yield f"Speed-up of `{ours}` over `{BASELINE}`{_repeats(results.records)}; in brackets,"
    yield "the share of the speed at which this memory moves the bytes that have to move (what fits in"
    yield "cache may exceed it)."
    yield ""
    yield "| case | tensors | gradients | " + " | ".join(_COLUMNS.values()) + " |"
    yield "|---|---|---|" + "---|" * len(_COLUMNS)
    rows = {(r.case, r.dtype): r for r in results.records if r.dtype in dtypes}
    found = {r.key: r for r in results.records}
    for (case, dtype), record in rows.items():
        cells = [_cell(found.get((case, dtype, o.name, o.state, str(ours)))) for o in OPERATIONS]
        size = f"{_amount(record.bytes)} {dtype}"
        yield f"| {case} | {record.tensors:,} | {size} | " + " | ".join(cells) + " |"


def _cell(record: Record | None) -> str:
    if record is None:
        return "not measured"
    if record.speedup_vs_torch is None:
        return "wrong" if not record.ok else "not measured"
    return f"{_times(record.speedup_vs_torch)} ({_share(record.pct_of_bound)})"


def _notes(results: Results) -> Iterator[str]:
    costs = host.costs(results.host)
    ours = serving(results)
    if ours in costs and BASELINE in costs:
        us, torch_us = costs[ours], costs[BASELINE]
        yield f"One `clip_grad_norm_` call takes the host {us.us_for_300:.3g} µs for 300 one-element tensors"
        yield f"and {us.us_per_further:.2g} µs for each further one; `{BASELINE}` takes"
        yield f"{torch_us.us_for_300:.3g} µs and {torch_us.us_per_further:.2g} µs."
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


def _training(path: Path) -> Iterator[str]:
    if path.exists():
        yield training_results.sentence(path)


def _text(lines: Sequence[str]) -> str:
    """Return the lines as Markdown, where several empty ones are one."""
    return re.sub("\n{3,}", "\n\n", "\n".join(lines))


def _repeats(records: Sequence[Record]) -> str:
    counts = [r.repeats for r in records if r.repeats is not None]
    return f", median of {min(counts)} to {max(counts)} interleaved pairs" if counts else ", median of pairs"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def _share(percent: float | None) -> str:
    if percent is None:
        return ""
    return f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %" if percent >= 0.1 else "< 0.1 %"


def _amount(size: int) -> str:
    for unit, bytes_of_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.3g} {unit}"
    return f"{size} B"


if __name__ == "__main__":
    sys.exit(main())
