"""One case: the gate, then the times of what passed, one record per operation and implementation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks import gate, timing
from benchmarks.gate import Verdict
from benchmarks.implementations import BASELINE, Implementation
from benchmarks.machine import Bandwidths, cache_bytes
from benchmarks.operations import Operation
from benchmarks.results import Record
from benchmarks.shapes import Case
from benchmarks.timing import Timing, percentile
from benchmarks.workload import Workload


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


def measure_case(
    case: Case,
    dtype: str,
    operations: Sequence[Operation],
    implementations: Sequence[Implementation],
    settings: Settings,
) -> Iterator[list[Record]]:
    """Yield the records of one operation after the other.

    An implementation that failed the gate is not timed. The exception is torch.nn.utils,
    which is timed so that the others have something to be compared with, but gets no
    speed-up, no bandwidth and no share of the bound either.
    """
    workload = Workload(case, dtype, settings.device, cache_bytes(settings.device))
    for operation in operations:
        verdicts = {i.name: gate.judge(i, operation, workload) for i in implementations}
        timed = [i for i in implementations if verdicts[i.name].ok or _can_be_timed(i, verdicts[i.name])]
        bandwidths = settings.bandwidths()
        times = timing.measure(timed, operation, workload, repeats=settings.repeats, seconds=settings.seconds)
        timings = {i.name: t for i, t in zip(timed, times)}
        yield [
            _record(workload, operation, bandwidths, name=name, verdict=verdict, timings=timings)
            for name, verdict in verdicts.items()
        ]


def _can_be_timed(implementation: Implementation, verdict: Verdict) -> bool:
    raised = verdict.max_rel_error is None
    return implementation.name == BASELINE and not raised


def _record(
    workload: Workload,
    operation: Operation,
    bandwidths: Bandwidths,
    *,
    name: str,
    verdict: Verdict,
    timings: dict[str, Timing],
) -> Record:
    times, baseline = timings.get(name), timings.get(BASELINE)
    record = Record(
        case=workload.case.name,
        tensors=workload.case.tensors,
        numel=workload.case.numel,
        bytes=workload.bytes,
        dtype=workload.dtype,
        device=workload.device.type,
        op=operation.name,
        state=operation.state,
        impl=name,
        bound_us=round(operation.bound_us(workload.bytes, bandwidths), 6),
        max_rel_error=_finite(verdict.max_rel_error),
        ok=verdict.ok,
        problem=verdict.problem,
    )
    if times is None:
        return record
    p20, p50, p80 = (percentile(times.us, percent) for percent in (20, 50, 80))
    record = replace(
        record,
        repeats=len(times.us),
        p20_us=round(p20, 3),
        p50_us=round(p50, 3),
        p80_us=round(p80, 3),
        host_us=times.host_us,
        launches=times.launches,
        scratch_bytes=times.scratch_bytes,
    )
    if not verdict.ok:
        return record
    record = replace(record, gbps=round(operation.moved_bytes(workload.bytes) / p50 / 1e3, 3))
    if baseline is not None:
        ratios = times.ratios_to(baseline)
        slow, median, fast = (round(percentile(ratios, percent), 3) for percent in (20, 50, 80))
        record = replace(record, speedup_p20=slow, speedup_vs_torch=median, speedup_p80=fast)
    return replace(record, pct_of_bound=round(100 * record.bound_us / p50, 2))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
