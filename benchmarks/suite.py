"""The whole run: every case, dtype, operation and implementation, one record each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks import gate, timing
from benchmarks.implementations import BASELINE, Implementation
from benchmarks.machine import Bandwidths, cache_bytes
from benchmarks.operations import OPERATIONS, Operation
from benchmarks.shapes import Case
from benchmarks.timing import Timing
from benchmarks.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the results file.

    Args:
        case, tensors, numel, bytes, dtype, device, op, state, impl: what was measured.
        p20_us, p50_us, p80_us: percentiles of the time of one call; None if it was not timed.
        host_us, launches, scratch_bytes: see Timing; None on a CPU.
        gbps: bytes that have to move, over p50_us.
        bound_us: time to move them at the bandwidth measured in the same run.
        pct_of_bound: bound_us as a share of p50_us, in percent.
        speedup_vs_torch: median over pairs of calls; None for whatever failed the gate.
        max_rel_error: see gate.py; None if the call raised or an error is not finite.
        ok: whether the gate let it pass.
    """

    case: str
    tensors: int
    numel: int
    bytes: int
    dtype: str
    device: str
    op: str
    state: str
    impl: str
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    host_us: float | None = None
    launches: int | None = None
    scratch_bytes: int | None = None
    gbps: float | None = None
    bound_us: float
    pct_of_bound: float | None = None
    speedup_vs_torch: float | None = None
    max_rel_error: float | None = None
    ok: bool


@dataclass(frozen=True)
class Settings:
    """How one run measures.

    Args:
        device: where.
        bandwidths: what the bound is made from, measured when called.
        repeats: calls of each implementation, or None for as many as fit in ``seconds``.
        seconds: time for one operation on one case in all implementations.
    """

    device: torch.device
    bandwidths: Callable[[], Bandwidths]
    repeats: int | None
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """The records of one operation on one case, and what the gate said about each implementation."""

    records: list[Record]
    problems: dict[str, str]


def measure_case(
    case: Case,
    dtype: str,
    operations: Sequence[Operation],
    implementations: Sequence[Implementation],
    settings: Settings,
) -> Iterator[Outcome]:
    """Yield one Outcome per operation: gate first, then the times of what passed.

    An implementation that failed the gate is not timed. The exception is torch.nn.utils,
    which is timed so that the others have something to be compared with, but gets no
    speed-up, no bandwidth and no share of the bound either.
    """
    workload = Workload(case, dtype, settings.device, cache_bytes(settings.device))
    bandwidths = settings.bandwidths()
    for operation in operations:
        verdicts = {i.name: gate.judge(i, operation, workload) for i in implementations}
        timed = [i for i in implementations if verdicts[i.name].ok or _can_be_timed(i, verdicts[i.name])]
        times = timing.measure(timed, operation, workload, repeats=settings.repeats, seconds=settings.seconds)
        timings = {i.name: t for i, t in zip(timed, times)}
        records = [
            _record(workload, operation, bandwidths, name=name, verdict=verdict, timings=timings)
            for name, verdict in verdicts.items()
        ]
        yield Outcome(records, {name: v.problem for name, v in verdicts.items() if v.problem is not None})


def _can_be_timed(implementation: Implementation, verdict: gate.Verdict) -> bool:
    raised = verdict.max_rel_error is None
    return implementation.name == BASELINE and not raised


def _record(
    workload: Workload,
    operation: Operation,
    bandwidths: Bandwidths,
    *,
    name: str,
    verdict: gate.Verdict,
    timings: dict[str, Timing],
) -> Record:
    times, baseline = timings.get(name), timings.get(BASELINE)
    record = Record(
        case=workload.case.name,
        tensors=workload.case.tensors,
        numel=workload.case.numel,
        bytes=workload.bytes,
        dtype=workload.dtype_name,
        device=workload.device.type,
        op=operation.name,
        state=operation.state,
        impl=name,
        bound_us=operation.bound_us(workload.bytes, bandwidths),
        max_rel_error=_finite(verdict.max_rel_error),
        ok=verdict.ok,
    )
    if times is None:
        return record
    p20, p50, p80 = (times.percentile(percent) for percent in (20, 50, 80))
    record = replace(
        record,
        p20_us=round(p20, 3),
        p50_us=round(p50, 3),
        p80_us=round(p80, 3),
        host_us=times.host_us,
        launches=times.launches,
        scratch_bytes=times.scratch_bytes,
    )
    if not verdict.ok:
        return record
    record = replace(
        record,
        gbps=round(operation.moved_bytes(workload.bytes) / p50 / 1e3, 3),
        speedup_vs_torch=None if baseline is None else round(times.speedup_over(baseline), 3),
    )
    return with_bound(record, bandwidths)


def with_bound(record: Record, bandwidths: Bandwidths) -> Record:
    """Return the record with its bound recomputed for these bandwidths."""
    (operation,) = (o for o in OPERATIONS if (o.name, o.state) == (record.op, record.state))
    bound_us = operation.bound_us(record.bytes, bandwidths)
    judged = record.ok and record.p50_us is not None
    share = round(100 * bound_us / record.p50_us, 2) if judged and record.p50_us else None
    return replace(record, bound_us=round(bound_us, 3), pct_of_bound=share)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
