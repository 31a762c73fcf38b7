"""What ``python -m benchmarks.distributed`` found: the records, their tables and the figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import plot
from benchmarks.contenders import BASELINE
from benchmarks.results import read_lines, write_lines

OURS = "gradclip_ext"
_SUFFIX = "-distributed"
# What README shows.
_COUNTS = (300, 2000)
_NAMES = {"gpt2-124m": "GPT-2 (124M)"}


@dataclass(frozen=True, kw_only=True)
class ShardedRecord:
    """One list of DTensors, clipped by one implementation.

    Args:
        ranks: processes, each with a share of every tensor.
        mesh: shape of the device mesh; the last dimension shards, one before it replicates.
        case: "8x8" for many small shards, else the name of a model.
        tensors, dtype: of the list.
        state: whether the gradients are "clipped" or the norm is below the threshold.
        impl: what clipped.
        first_ms: the first call on this set of gradients.
        p50_ms: later calls, the median.
        gone_ms: the call after one gradient became None, on every rank.
        speedup_vs_torch: median over pairs of later calls, side by side.
        collectives: how many a rank takes part in, in one later call.
        collective_bytes: what it gives to them.
        norm_error: relative, against float64.
        problem: why something was not measured; None if all was.
    """

    ranks: int
    mesh: list[int]
    case: str
    tensors: int
    dtype: str
    state: str
    impl: str
    first_ms: float | None = None
    p50_ms: float | None = None
    gone_ms: float | None = None
    speedup_vs_torch: float | None = None
    collectives: int | None = None
    collective_bytes: int | None = None
    norm_error: float | None = None
    problem: str | None = None


HEADER = (
    f"{'ranks, mesh':<14} {'list':<30} {'by':<16} {'first':>10} {'later':>10} {'one gone':>10}"
    f" {'speed-up':>8} {'collectives':>14} {'error':>8}"
)


def row(record: ShardedRecord) -> str:
    """Return the record as a line of the table."""

    first, later, gone = (
        "-" if ms is None else _ms(ms) for ms in (record.first_ms, record.p50_ms, record.gone_ms)
    )
    what = f"{record.tensors} {record.case} {record.dtype} {record.state}"
    ratio = "-" if record.speedup_vs_torch is None else f"{record.speedup_vs_torch:.2f}x"
    sent = "-" if record.collectives is None else f"{record.collectives}, {record.collective_bytes} B"
    error = "-" if record.norm_error is None else f"{record.norm_error:.1e}"
    line = (
        f"{record.ranks}, {tuple(record.mesh)!s:<10} {what:<30} {record.impl:<16} {first:>10}"
        f" {later:>10} {gone:>10} {ratio:>8} {sent:>14} {error:>8}"
    )
    return line if record.problem is None else f"{line}  {record.problem}"


def file_name(stem: str) -> str:
    """Return the name of the file that belongs to a results file."""
    return f"{stem}{_SUFFIX}.jsonl"


def is_sharded(path: Path) -> bool:
    """Tell such a file from other results by its name."""
    return path.stem.endswith(_SUFFIX)


def save(path: Path, machine: dict[str, Any], records: Sequence[ShardedRecord]) -> None:
    """Write the machine and the records."""
    write_lines(path, [("machine", machine), *(("sharded", asdict(record)) for record in records)])


def load(path: Path) -> tuple[dict[str, Any], list[ShardedRecord]]:
    """Return the machine and the records of a file."""
    lines = read_lines(path)
    return lines["machine"][0], [ShardedRecord(**fields) for fields in lines["sharded"]]


def table(block: dict[str, Any], records: Sequence[ShardedRecord]) -> Iterator[str]:
    """Yield what README shows: small DTensors on one rank, a model on two."""
    by = {(r.ranks, len(r.mesh), r.case, r.tensors, r.dtype, r.state, r.impl): r for r in records}
    where = f"{block['cpu']}, {block['cores']} cores, torch {block['torch']}, gloo, commit {block['commit']}"
    yield f"| {where} | `{BASELINE}` | `gradclip_ext` |"
    yield "|---|---|---|"
    for key, ours in by.items():
        theirs = by.get((*key[:-1], BASELINE))
        if key[:3] == (1, 1, "8x8") and ours.impl == OURS:
            yield from _small_rows(ours, theirs)
    for key, ours in by.items():
        theirs = by.get((*key[:-1], BASELINE))
        if ours.ranks == 2 and ours.case != "8x8" and ours.impl == OURS and theirs is not None:
            state = "nothing to clip" if ours.state == "unclipped" else "clipping"
            what = f"{_NAMES.get(ours.case, ours.case)} in {ours.dtype}, sharded over two ranks, {state}"
            yield f"| {what} | {_ms(theirs.p50_ms)} | {_ms(ours.p50_ms)}{_bold(ours.speedup_vs_torch)} |"
    worst, ours_worst = (
        max((r.norm_error or 0.0 for r in records if r.impl == impl), default=0.0)
        for impl in (BASELINE, OURS)
    )
    yield f"| largest relative error of these norms | {worst:.0e} | **{ours_worst:.0e}** |"


def _small_rows(ours: ShardedRecord, theirs: ShardedRecord | None) -> Iterator[str]:
    if ours.tensors not in _COUNTS:
        return
    small = f"{ours.tensors:,} small DTensors on one rank"
    first, later = (theirs.first_ms, theirs.p50_ms) if theirs is not None else (None, None)
    yield f"| {small}, a new set of gradients | {_ms(first)} | {_ms(ours.first_ms)} |"
    yield f"| {small}, the same set again | {_ms(later)} | {_ms(ours.p50_ms)}{_bold(ours.speedup_vs_torch)} |"


def _ms(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g} ms" if value < 1e3 else f"{value / 1e3:.3g} s"


def _bold(speedup: float | None) -> str:
    return "" if speedup is None else f", **{speedup:.3g}x**"


def draw(machine_block: dict[str, Any], records: Sequence[ShardedRecord], path: Path) -> bool:
    """Draw the time of a call against the number of DTensors, on one rank."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, pick in (
        ("first call", "first_ms"),
        ("later calls", "p50_ms"),
        ("one gradient gone", "gone_ms"),
    ):
        for impl in (BASELINE, OURS):
            points = [
                (r.tensors, getattr(r, pick))
                for r in records
                if r.ranks == 1 and r.case == "8x8" and len(r.mesh) == 1 and r.impl == impl
            ]
            curves[f"{impl}, {name}"] = [(x, y) for x, y in points if y is not None]
    title = f"{machine_block['cpu']}, torch {machine_block['torch']}: clip_grad_norm_ of DTensors, one rank"
    return plot.sharded_times(curves, title, path)
