"""README's numbers and figures, and the index of the results, made from the results files.

``python -m benchmarks.report`` writes the parts of README.md between markers, benchmarks/results/README.md
and the figures, all from the committed results files. A test fails when any of them does not match the
files. ``python -m benchmarks.report FILE ...`` prints every row of files.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from textwrap import wrap

from benchmarks import distributed_results, plot, second_pass, survival
from benchmarks.contenders import BASELINE, is_ours
from benchmarks.operations import ADAPTIVE, BEYOND_TORCH, PER_TENSOR, STATS, STEP
from benchmarks.results import Record, Results, Training, host_costs, is_training, training_file_name
from benchmarks.terminal import amount, duration, every_row, percent, ratio

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDER = Path(__file__).parent / "results"
_DESCRIPTION = "Write README's numbers and figures, and the index of the results, from the committed files."
_COLUMNS = {
    "clip_grad_norm_:unclipped": "norm, nothing to clip",
    "clip_grad_norm_:clipped": "norm, clipping",
    "clip_grad_value_:unclipped": "value, nothing exceeds",
    "clip_grad_value_:clipped": "value, all exceed",
    "get_total_norm:unclipped": "`get_total_norm`",
}
# Where torch.nn.utils has no function, torch's operations are compared.
_BEYOND_COLUMNS = {
    f"{STATS}:unclipped": "statistics",
    f"{PER_TENSOR}:unclipped": "per tensor, nothing to clip",
    f"{PER_TENSOR}:clipped": "per tensor, clipping",
    f"{ADAPTIVE}:unclipped": "adaptive, nothing to clip",
    f"{ADAPTIVE}:clipped": "adaptive, clipping",
}
# What a state of an operation is called.
_STATES = {"clipped": "clipping", "unclipped": "nothing to clip"}
# README shows models that people train, and many tiny tensors; the index has the rest.
_README_COLUMNS = ("clip_grad_norm_:unclipped", "clip_grad_norm_:clipped", "clip_grad_value_:clipped")
_README_BEYOND = (f"{STATS}:unclipped", f"{PER_TENSOR}:clipped", f"{ADAPTIVE}:clipped")
# Files beside a results file, which have names like its own.
_OTHER_KINDS = (is_training, distributed_results.is_sharded, survival.is_survival)
_README_ROWS = {
    ("gpt2-124m", "float32"): "GPT-2 (124M)",
    ("gpt2-124m", "bfloat16"): "GPT-2 (124M)",
    ("resnet-50", "float32"): "ResNet-50",
    ("2000x64", "float32"): "2,000 x 64",
}


def load(folder: Path = FOLDER) -> dict[str, Results]:
    """Return the results files by stem, those of GPUs first."""
    paths = sorted(p for p in folder.glob("*.jsonl") if not any(is_kind(p) for is_kind in _OTHER_KINDS))
    files = {p.stem: Results.load(p) for p in paths}
    return dict(sorted(files.items(), key=lambda item: item[1].machine["gpu"] is None))


def default_backend(results: Results) -> str:
    """Return the first of our backends, which handles the device unless another is named; "" without one."""
    return next((r.impl for r in results.records if is_ours(r.impl)), "")


# ---------------------------------------------------------------- README


def readme_blocks(files: dict[str, Results], folder: Path = FOLDER) -> dict[str, str]:
    """Return what stands between the markers of README.md, by the name in the markers."""
    return {
        "numbers": _text(_first_screen(files)),
        "sharded": _text(_sharded_tables(files, folder)),
        "survival": _text(_survival(files, folder)),
        "table": _text(_small_tables(files)),
        "beyond": _text(_beyond_tables(files)),
    }


def _first_screen(files: dict[str, Results]) -> Iterator[str]:
    """Yield four numbers and the picture of the first file."""
    for stem, results in list(files.items())[:1]:
        yield f"| {results.title} | `{BASELINE}` | `gradclip_ext` |"
        yield "|---|---|---|"
        yield from _four_numbers(results)
        yield ""
        yield f"![speed-up over {BASELINE}, {results.title}](benchmarks/results/{stem}-summary.png)"
        yield ""


def _four_numbers(results: Results) -> Iterator[str]:
    ours = default_backend(results)
    found = {(r.dtype, f"{r.op}:{r.state}", r.impl): r for r in results.records if r.case == "gpt2-124m"}
    for dtype in ("float32", "bfloat16"):
        theirs, here = (found.get((dtype, "clip_grad_norm_:unclipped", impl)) for impl in (BASELINE, ours))
        if theirs and here and here.speedup_vs_torch is not None:
            here_took = f"{duration(here.p50_us)}, **{ratio(here.speedup_vs_torch)}**"
            what = f"`clip_grad_norm_` on GPT-2 (124M) in {dtype}, nothing to clip"
            what += ", time on the GPU" if results.machine["gpu"] else ""
            yield f"| {what} | {duration(theirs.p50_us)} | {here_took} |"
    costs = host_costs(results.host)
    if ours in costs and BASELINE in costs:
        us, torch_us = costs[ours].us_for_300, costs[BASELINE].us_for_300
        what = "`clip_grad_norm_` on 300 one-element tensors, time on the host"
        yield f"| {what} | {duration(torch_us)} | {duration(us)}, **{ratio(torch_us / us)}** |"
    theirs, here = (found.get(("bfloat16", "get_total_norm:unclipped", impl)) for impl in (BASELINE, ours))
    if theirs and here and theirs.max_rel_error is not None and here.max_rel_error is not None:
        what = "relative error of the norm of GPT-2 (124M) in bfloat16"
        yield f"| {what} | {theirs.max_rel_error:.1e} | **{here.max_rel_error:.1e}** |"


def _small_tables(files: dict[str, Results]) -> Iterator[str]:
    for results in files.values():
        yield from _heading(results)
        yield ""
        rows = {key: name for key, name in _README_ROWS.items() if key in _rows(results)}
        yield from _table(results, rows, _README_COLUMNS)
        yield ""
    if not any(results.machine["gpu"] for results in files.values()):
        yield "There is no results file of a GPU yet."
        yield ""


def _beyond_tables(files: dict[str, Results]) -> Iterator[str]:
    """Yield for each file what torch.nn.utils has no function for."""
    for results in files.values():
        rows = {key: name for key, name in _README_ROWS.items() if key in _rows(results, BEYOND_TORCH)}
        if rows:
            yield from _table(results, rows, _README_BEYOND)
            yield ""


def _sharded_tables(files: dict[str, Results], folder: Path) -> Iterator[str]:
    for stem in files:
        path = folder / distributed_results.file_name(stem)
        if path.exists():
            yield from distributed_results.table(*distributed_results.load(path))
            yield ""
            yield f"![time of a call](benchmarks/results/{path.stem}.png)"
            yield ""


def _survival(files: dict[str, Results], folder: Path) -> Iterator[str]:
    for stem in files:
        path = folder / survival.file_name(stem)
        if path.exists():
            yield from wrap(survival.Survival.load(path).sentences(), width=110)
            yield ""
            yield f"![loss and norm of each step](benchmarks/results/{path.stem}.png)"
            yield ""


def _markers(name: str) -> tuple[str, str]:
    return (
        f"<!-- begin {name}: made by python -m benchmarks.report, not by hand -->\n",
        f"<!-- end {name} -->",
    )


def replaced(text: str, blocks: dict[str, str]) -> str:
    """Return README's text with other blocks between the markers.

    Raises:
        ValueError: a block has no pair of markers.
    """
    for name, block in blocks.items():
        opening, closing = _markers(name)
        before, begin, rest = text.partition(opening)
        _, end, after = rest.partition(closing)
        if not begin or not end:
            raise ValueError(f"{README.name} has no pair of markers {opening.strip()} and {closing}")
        text = f"{before}{begin}{block}{end}{after}"
    return text


# ---------------------------------------------------------------- index


def index(files: dict[str, Results], folder: Path = FOLDER) -> str:
    """Return benchmarks/results/README.md: machine, table, notes and figures of every file."""
    parts = [
        "# Results",
        "",
        "Made by `python -m benchmarks.report` from the files beside it, not by hand. A `.jsonl` file has",
        "one JSON object per line: the machine, then the records. `python -m benchmarks.report FILE`",
        "prints those of a benchmark, a training or sharded gradients as a table. Beside them:",
        *(f"[what decides how the kernels work]({f.name})," for f in sorted(folder.glob("design-*.json"))),
        "[the sizes of wheels](wheels.json).",
        "",
    ]
    for stem, results in files.items():
        parts += [f"## [{results.title}]({stem}.jsonl)", "", *_heading(results), ""]
        parts += [*_table(results, {key: key[0] for key in _rows(results)}, tuple(_COLUMNS)), ""]
        beyond = {key: key[0] for key in _rows(results, BEYOND_TORCH)}
        if beyond:
            parts += [*_table(results, beyond, tuple(_BEYOND_COLUMNS)), ""]
            parts += [f"![speed-up beyond torch's functions]({stem}-beyond.png)", ""]
        parts += [*_notes(results), f"![speed-up]({stem}.png)", "", f"![bandwidth]({stem}-bandwidth.png)", ""]
        if results.host:
            parts += [f"![host time]({stem}-host.png)", ""]
        training = folder / training_file_name(stem)
        if training.exists():
            parts += [training_sentence(training), f"![training]({training.stem}.png)", ""]
        sharded = folder / distributed_results.file_name(stem)
        if sharded.exists():
            parts += [f"### [Sharded gradients]({sharded.name})", ""]
            parts += [f"![sharded gradients]({sharded.stem}.png)", ""]
        survivors = folder / survival.file_name(stem)
        if survivors.exists():
            parts += [f"### [Training with bad steps]({survivors.name})", ""]
            parts += [f"![training with bad steps]({survivors.stem}.png)", ""]
    parts += second_pass.section(folder)
    return _text(parts)


def draw(stem: str, results: Results, folder: Path = FOLDER) -> None:
    """Draw the figures of one file, and that of the sharded gradients beside it."""
    ours = default_backend(results)
    in_readme = lambda r: r.impl == ours and f"{r.op}:{r.state}" in _README_COLUMNS
    plot.speedups(results, folder / f"{stem}-summary.png", in_readme)
    plot.draw_all(results, folder / f"{stem}.png")
    sharded = folder / distributed_results.file_name(stem)
    if sharded.exists():
        distributed_results.draw(*distributed_results.load(sharded), sharded.with_suffix(".png"))
    survivors = folder / survival.file_name(stem)
    if survivors.exists():
        survival.Survival.load(survivors).draw(survivors.with_suffix(".png"))


# ---------------------------------------------------------------- parts of both


def _heading(results: Results) -> Iterator[str]:
    block = results.machine
    device = block["cpu"]
    if block["gpu"]:
        device = f"{block['gpu']}, driver {block['driver']}, CUDA {block['cuda']}"
    yield f"**{device}**, {block['cores']} CPU cores, torch {block['torch']}, commit {block['commit']},"
    yield f"{block['date']}. Memory was read at {block['read_gbps']:.1f} GB/s, and read and written in place"
    yield f"at {block['inplace_gbps']:.1f} GB/s, medians of the run."


def _rows(results: Results, functions: Collection[str] | None = None) -> dict[tuple[str, str], Record]:
    """Return a record of every case and dtype on which one of these functions, or any, was measured."""
    return {(r.case, r.dtype): r for r in results.records if functions is None or r.op in functions}


def _table(results: Results, rows: dict[tuple[str, str], str], columns: Sequence[str]) -> Iterator[str]:
    """Yield a table of speed-ups.

    Args:
        results: the file.
        rows: cases and dtypes, and what the row is called.
        columns: operations with their states.
    """
    ours = default_backend(results)
    theirs = f"`{BASELINE}`" if columns[0] in _COLUMNS else "torch's operations"
    yield f"Speed-up of `{ours}` over {theirs}{_repeats(results.records)}; in brackets,"
    yield "the share of the measured memory bandwidth that is reached, counting only bytes that have to be"
    yield "read or written (above 100 % where they fit in cache, or where the shared machine was quieter)."
    yield ""
    yield "| gradients | " + " | ".join((_COLUMNS | _BEYOND_COLUMNS)[label] for label in columns) + " |"
    yield "|---|" + "---|" * len(columns)
    found = {(r.case, r.dtype, f"{r.op}:{r.state}"): r for r in results.records if r.impl == ours}
    sizes = _rows(results)
    for (case, dtype), name in rows.items():
        record = sizes[case, dtype]
        tensors = f"{record.tensors:,} tensor{'s' if record.tensors > 1 else ''}"
        gradients = f"{name}, {dtype}: {tensors}, {amount(record.bytes)}"
        cells = [_cell(found.get((case, dtype, label))) for label in columns]
        yield f"| {gradients} | " + " | ".join(cells) + " |"


def _cell(record: Record | None) -> str:
    if record is None:
        return "not measured"
    if record.speedup_vs_torch is None:
        return "wrong" if not record.ok else "not measured"
    return f"{ratio(record.speedup_vs_torch)} ({percent(record.pct_of_bound)})"


def _notes(results: Results) -> Iterator[str]:
    costs = host_costs(results.host)
    ours = default_backend(results)
    if ours in costs and BASELINE in costs:
        us, torch_us = costs[ours], costs[BASELINE]
        yield f"A `clip_grad_norm_` call on 300 one-element tensors takes the host {duration(us.us_for_300)}"
        yield f"and {us.us_per_further:.2g} us for each further one; `{BASELINE}` takes"
        yield f"{duration(torch_us.us_for_300)} and {torch_us.us_per_further:.2g} us."
        yield ""
    steps = [r for r in results.records if r.impl == ours and r.op.endswith(STEP) and r.speedup_vs_torch]
    for state, of_state in groupby(sorted(steps, key=lambda r: r.state), key=lambda r: r.state):
        ratios = [f"{ratio(r.speedup_vs_torch)} on {r.case} in {r.dtype}" for r in of_state]
        what = f"`clip_grad_norm_` and AdamW's step together, {_STATES[state]}, on new gradients"
        yield f"{what}: {', '.join(ratios)}."
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


def _text(lines: Iterable[str]) -> str:
    """Return the lines as Markdown, where several empty ones are one."""
    return re.sub("\n{3,}", "\n\n", "\n".join(lines))


def _repeats(records: Sequence[Record]) -> str:
    counts = [r.repeats for r in records if r.repeats is not None]
    return f", median of {min(counts)} to {max(counts)} interleaved pairs" if counts else ", median of pairs"


def training_sentence(path: Path) -> str:
    """Return what a training file says, in words."""
    found = Training.load(path)
    size = f"{found.parameters / 1e6:.3g} M parameters, {found.dtype}"
    took = ", ".join(
        f"{1e3 * median(run.clip_ms):,.0f} us ({100 * run.clip_share:.2f} %) by `{run.name}`"
        for run in found.clipped
    )
    return (
        f"Training {found.model} ({size}) for {found.steps} steps with max_norm {found.max_norm:g}, "
        f"clipping took this much of a step: {took}. As means over a fifteenth of the steps, "
        f"losses differ by {found.difference():.1e} at most.\n"
    )


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Write README.md's blocks, the index and the figures, or print files; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=_DESCRIPTION)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="print every row of these files")
    paths: list[Path] = parser.parse_args(argv).files
    return _print_rows(paths) if paths else _write()


def _print_rows(paths: Sequence[Path]) -> int:
    for path in paths:
        try:
            lines = _rows_of(path)
        except ValueError as error:
            print(f"python -m benchmarks.report: {error}", file=sys.stderr)
            return 2
        print("\n".join(lines))
    return 0


def _rows_of(path: Path) -> list[str]:
    if distributed_results.is_sharded(path):
        return [distributed_results.HEADER, *map(distributed_results.row, distributed_results.load(path)[1])]
    results = Results.load(path)
    return [results.title, *every_row(results)]


def _write() -> int:
    if not plot.available():
        print("python -m benchmarks.report: needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return 2
    files = load()
    README.write_text(replaced(README.read_text(), readme_blocks(files)))
    (FOLDER / "README.md").write_text(index(files))
    for stem, results in files.items():
        draw(stem, results)
    print(f"README.md, benchmarks/results/README.md and the figures are made from {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
