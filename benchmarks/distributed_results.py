"""What ``python -m benchmarks.distributed`` found: the records, their table, sentences and figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import plot
from benchmarks.contenders import BASELINE
from benchmarks.results import read_lines, write_lines

OURS = "gradclip_ext"
_SUFFIX = "-distributed"


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

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g} ms" if value < 1e3 else f"{value / 1e3:.3g} s"

    what = f"{record.tensors} {record.case} {record.dtype} {record.state}"
    ratio = "-" if record.speedup_vs_torch is None else f"{record.speedup_vs_torch:.2f}x"
    sent = "-" if record.collectives is None else f"{record.collectives}, {record.collective_bytes} B"
    error = "-" if record.norm_error is None else f"{record.norm_error:.1e}"
    line = (
        f"{record.ranks}, {tuple(record.mesh)!s:<10} {what:<30} {record.impl:<16} {ms(record.first_ms):>10}"
        f" {ms(record.p50_ms):>10} {ms(record.gone_ms):>10} {ratio:>8} {sent:>14} {error:>8}"
    )
    return line if record.problem is None else f"{line}  {record.problem}"


def file_name(stem: str) -> str:
    """Return the name of the file that belongs to a results file."""
    return f"{stem}{_SUFFIX}.jsonl"


def save(path: Path, machine: dict[str, Any], records: Sequence[ShardedRecord]) -> None:
    """Write the machine and the records."""
    write_lines(path, [("machine", machine), *(("sharded", asdict(record)) for record in records)])


def load(path: Path) -> tuple[dict[str, Any], list[ShardedRecord]]:
    """Return the machine and the records of a file."""
    lines = read_lines(path)
    return lines["machine"][0], [ShardedRecord(**fields) for fields in lines["sharded"]]


def sentences(records: Sequence[ShardedRecord]) -> Iterator[str]:
    """Yield what the records say, for README."""
    small = [r for r in records if r.ranks == 1 and r.case == "8x8" and len(r.mesh) == 1]
    for _, of_count in groupby(small, key=lambda r: r.tensors):
        by = {r.impl: r for r in of_count}
        ours, theirs = by.get(OURS), by.get(BASELINE)
        if ours is None or theirs is None or theirs.p50_ms is None or theirs.first_ms is None:
            continue
        if ours.tensors in (300, 2000) and ours.p50_ms is not None and ours.first_ms is not None:
            yield (
                f"- {ours.tensors:,} small DTensors on one rank: {ours.p50_ms:.2g} ms a call, "
                f"`{BASELINE}` {theirs.p50_ms:.2g} ms; the first call on a new set of gradients "
                f"{ours.first_ms:.2g} ms, `{BASELINE}` {_seconds(theirs.first_ms)}."
            )
    for r in records:
        if r.ranks == 2 and r.impl == OURS and r.case != "8x8" and r.speedup_vs_torch is not None:
            state = "nothing to clip" if r.state == "unclipped" else "clipping"
            yield (
                f"- {r.case} in {r.dtype} on two ranks, {state}: {r.speedup_vs_torch:.2f}x the speed of "
                f"`{BASELINE}`, norm error {r.norm_error:.0e}."
            )
    ours_sent = {(r.collectives, r.collective_bytes) for r in records if r.impl == OURS}
    if len(ours_sent) == 1:
        ((count, size),) = ours_sent
        yield f"- Collectives of a call in all of these layouts: {count}, of {size} bytes."


def _seconds(ms: float) -> str:
    return f"{ms:.2g} ms" if ms < 1e3 else f"{ms / 1e3:.2g} s"


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
