"""Measures how long a call takes: records of the cases, and the host time of a call.

The implementations take turns in one process, so that a machine that is slower for a moment is slower for
all of them. The results are medians of the times, and the median of the ratios of pairs of calls.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from benchmarks import gate, machine
from benchmarks.cases import Case, Workload
from benchmarks.contenders import BASELINE, Implementation
from benchmarks.gate import Verdict
from benchmarks.machine import Bandwidths, Call, Clock, cache_bytes
from benchmarks.operations import OPERATIONS, Operation
from benchmarks.results import HostTime, Record

# The smallest number of repeats that gives a reliable median, and the largest that improves it.
ENOUGH_REPEATS, _MAX_REPEATS = 10, 200
_HOST_REPEATS = 20


@dataclass(frozen=True)
class Settings:
    """How one run measures.

    Args:
        device: where.
        bandwidths: measures what the bound is made from.
        repeats: calls of each implementation, or None for as many as fit in ``seconds``: 200 at most,
            and 10 at least however long they take.
        seconds: time for one operation on one case in all implementations.
    """

    device: torch.device
    bandwidths: Callable[[], Bandwidths]
    repeats: int | None
    seconds: float


# ---------------------------------------------------------------- one case


def measure_case(
    case: Case,
    dtype: str,
    operations: Sequence[Operation],
    implementations: Sequence[Implementation],
    settings: Settings,
) -> Iterator[list[Record]]:
    """Yield the records of one operation after the other.

    An implementation that failed the gate is not timed. The exception is torch.nn.utils, which is timed
    so that the others can be compared with it, but gets no speed-up, no bandwidth and no share of the
    bound.
    """
    with_weights = any(operation.reads_weights for operation in operations)
    cache = cache_bytes(settings.device)
    workload = Workload(case, dtype, settings.device, cache, with_weights=with_weights)
    judged: dict[tuple[str, str], dict[str, Verdict]] = {}
    for operation in operations:
        call = operation.function, operation.state  # the same with an optimizer's step and without
        if call not in judged:
            measured = [i for i in implementations if i.is_measured(operation.function)]
            judged[call] = {i.name: gate.judge(i, operation, workload) for i in measured}
        verdicts = judged[call]
        found = [(i, verdicts[i.name]) for i in implementations if i.name in verdicts]
        timed = [i for i, verdict in found if verdict.ok or _is_baseline(i, verdict)]
        bandwidths = settings.bandwidths()
        timings = time_operation(timed, operation, workload, settings)
        yield [
            _record(workload, operation, bandwidths, name=name, verdict=verdict, timings=timings)
            for name, verdict in verdicts.items()
        ]


def _is_baseline(implementation: Implementation, verdict: Verdict) -> bool:
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
    if name not in timings:
        return record
    timing = timings[name]
    p20, p50, p80 = timing.percentiles(timing.us)
    record = replace(
        record,
        repeats=len(timing.us),
        p20_us=p20,
        p50_us=p50,
        p80_us=p80,
        host_us=timing.host_us,
        launches=timing.launches,
        scratch_bytes=timing.scratch_bytes,
    )
    if not verdict.ok:
        return record
    median_us = percentile(timing.us, 50)
    record = replace(
        record,
        gbps=round(operation.moved_bytes(workload.bytes) / median_us / 1e3, 3),
        pct_of_bound=round(100 * record.bound_us / median_us, 2),
    )
    if BASELINE not in timings:
        return record
    low, median, high = timing.percentiles(timing.ratios_to(timings[BASELINE]))
    return replace(record, speedup_p20=low, speedup_vs_torch=median, speedup_p80=high)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# ---------------------------------------------------------------- one operation


@dataclass(frozen=True)
class Timing:
    """Times of one implementation.

    Args:
        us: microseconds of each repeat; the same index in two Timings means side by side.
        host_us: median time until the call returns with an idle GPU; None on a CPU.
        launches: kernels, copies and fills that the GPU was given; None on a CPU.
        scratch_bytes: peak GPU memory beyond what was there before; None on a CPU.
    """

    us: list[float]
    host_us: float | None = None
    launches: int | None = None
    scratch_bytes: int | None = None

    def ratios_to(self, other: Timing) -> list[float]:
        """Return the times of ``other`` over these, repeat by repeat.

        A machine that is slow for a moment slows both halves of a pair, so the median of the ratios is
        steadier than the ratio of the medians.
        """
        return [theirs / ours for theirs, ours in zip(other.us, self.us)]

    @staticmethod
    def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
        """Return the percentiles 20, 50 and 80 as a record has them."""
        p20, p50, p80 = (round(percentile(values, percent), 3) for percent in (20, 50, 80))
        return p20, p50, p80


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile by linear interpolation."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def time_operation(
    implementations: Sequence[Implementation], operation: Operation, workload: Workload, settings: Settings
) -> dict[str, Timing]:
    """Time one operation in every implementation, and return the times by name.

    Gradients that a call wrote to are restored after it, untimed, so that every repeat of "clipped" does
    clip.
    """
    turns = _Turns([i.functions[operation.function] for i in implementations], operation, workload)
    on_gpu = workload.device.type == "cuda"
    with _no_garbage_collection():
        host_us: list[float | None] = [None] * len(implementations)
        clocks = [machine.device_clock(workload.device)] * len(implementations)
        if on_gpu:
            turns.take_one([machine.host_us] * len(implementations), 0)
            times = turns.take([machine.host_us] * len(implementations), _HOST_REPEATS)
            medians = [statistics.median(t) for t in times]
            clocks = [machine.device_clock(workload.device, median) for median in medians]
            host_us = [*medians]
        turns.take_one(clocks, 0)  # warms up
        times = turns.take(clocks, settings.repeats, settings.seconds)
    counts = [turns.count(index) if on_gpu else (None, None) for index in range(len(implementations))]
    return {
        i.name: Timing(us, host, launches, scratch)
        for i, us, host, (launches, scratch) in zip(implementations, times, host_us, counts)
    }


class _Turns:
    """The calls of one operation in several implementations.

    Args:
        functions: one per implementation.
        operation, workload: what they are called for.
    """

    def __init__(
        self, functions: Sequence[Callable[..., Any]], operation: Operation, workload: Workload
    ) -> None:
        self._functions, self._operation, self._workload = functions, operation, workload

    def take(self, clocks: Sequence[Clock], repeats: int | None, seconds: float = 0.0) -> list[list[float]]:
        """Return for each implementation its times; see Settings for the arguments."""
        start = time.monotonic()
        rows: list[list[float]] = []
        while len(rows) < (repeats or _MAX_REPEATS):
            rows.append(self.take_one(clocks, len(rows)))
            is_late = time.monotonic() - start > seconds
            if repeats is None and is_late and len(rows) >= ENOUGH_REPEATS:
                break
        return [list(column) for column in zip(*rows)]

    def take_one(self, clocks: Sequence[Clock], first: int) -> list[float]:
        """Return one time of each implementation; the one with index ``first`` begins."""
        count = len(self._functions)
        times = [0.0] * count
        for index in ((first + turn) % count for turn in range(count)):
            parameters, call = self._ready(index)
            times[index] = clocks[index](call)
            if self._operation.state == "clipped" and not self._operation.with_step:
                self._workload.restore(parameters)
        return times

    def _ready(self, index: int) -> tuple[list[Parameter], Call]:
        """Return a call with its arguments ready, so that timing it times nothing else."""
        workload, function = self._workload, self._functions[index]
        if self._operation.with_step:
            parameters, step = workload.train()
            clip = self._operation.bind(function, parameters, workload.norm)
            return parameters, lambda: (clip(), step())
        parameters = workload.next()
        call = self._operation.bind(function, parameters, workload.norm)
        workload.cool()
        return parameters, call

    def count(self, index: int) -> tuple[int, int]:
        """Return the launches and the peak scratch bytes of one call on a GPU."""
        parameters, call = self._ready(index)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        scratch = torch.cuda.max_memory_allocated() - before
        self._workload.restore(parameters)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            call()
            torch.cuda.synchronize()
        self._workload.restore(parameters)
        events = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
        # A span that a library names, as ours does for each call, is shown on the GPU, too.
        return sum(not event.is_user_annotation for event in events), scratch


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection, which would visit every parameter during a timed call."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ---------------------------------------------------------------- host time

HOST_COUNTS = (1, 300, 1000, 3000, 6000)
# Checked for one count only: six thousand tensors take seconds in float64, and the cases have checked lists
# of thousands.
_JUDGED_COUNT = 300
_HOST_CALLS = 5
# clip_grad_norm_ with nothing to clip: what most training steps do.
_HOST_OPERATION = OPERATIONS[0]


def host_times(
    implementations: Sequence[Implementation],
    device: torch.device,
    rounds: int,
    counts: Sequence[int] | None = None,
) -> Iterator[list[HostTime]]:
    """Yield the times for one number of tensors after the other.

    Everything is warm, unlike in the cases: each implementation makes one untimed call and then five
    timed ones, and they take turns that many ``rounds``. One that fails the gate is left out.

    Args:
        implementations: what to measure.
        device: of the one-element tensors.
        rounds: turns of each implementation.
        counts: numbers of tensors, or None for HOST_COUNTS.
    """
    clock: Clock = machine.host_us if device.type == "cuda" else machine.wall_us
    judged = _one_element_tensors(_JUDGED_COUNT, device)
    right = [i for i in implementations if gate.judge(i, _HOST_OPERATION, judged).ok]
    for count in counts or HOST_COUNTS:
        workload = _one_element_tensors(count, device)
        parameters = workload.next()
        functions = [i.functions[_HOST_OPERATION.function] for i in right]
        calls = [_HOST_OPERATION.bind(function, parameters, workload.norm) for function in functions]
        times: list[list[float]] = [[] for _ in right]
        with _no_garbage_collection():
            for _ in range(rounds):
                for call, found in zip(calls, times):
                    call()
                    found += [clock(call) for _ in range(_HOST_CALLS)]
        yield [HostTime(i.name, count, round(statistics.median(t), 3)) for i, t in zip(right, times)]


def _one_element_tensors(count: int, device: torch.device) -> Workload:
    # A cache of one byte: a single copy of the gradients, which stays warm.
    case = Case("host", "one-element tensors", ((1,),) * count)
    return Workload(case, "float32", device, cache_bytes=1)
