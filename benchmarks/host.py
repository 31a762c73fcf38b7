"""Host time: what a call costs before any gradient is large, against the number of tensors."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks import clocks, gate
from benchmarks.clocks import Clock
from benchmarks.implementations import Implementation
from benchmarks.operations import OPERATIONS
from benchmarks.results import HostTime
from benchmarks.shapes import Case
from benchmarks.workload import Workload

COUNTS = (1, 300, 1000, 3000, 10_000)
# Gated at one count only: looking at ten thousand tensors in float64 takes seconds, and the cases
# have gated lists of thousands already.
_GATED, _LAST = 300, COUNTS[-1]
_CALLS = 5
# clip_grad_norm_ with nothing to clip: what most training steps do.
_OPERATION = OPERATIONS[0]


@dataclass(frozen=True)
class Cost:
    """What one call costs the host: a list of 300 tensors, and each tensor beyond."""

    us_for_300: float
    us_per_further: float


def measure(
    implementations: Sequence[Implementation],
    device: torch.device,
    rounds: int,
    counts: Sequence[int] | None = None,
) -> Iterator[list[HostTime]]:
    """Yield the times for one number of tensors after the other.

    Everything is warm, unlike in the cases: each implementation makes one untimed call and
    then five timed ones, and they take turns that many ``rounds``. One that fails the gate is
    left out.

    Args:
        implementations: who.
        device: of the one-element tensors.
        rounds: turns of each implementation.
        counts: numbers of tensors, or None for COUNTS.
    """
    clock: Clock = clocks.host_us if device.type == "cuda" else clocks.wall_us
    gated = _workload(_GATED, device)
    right = [i for i in implementations if gate.judge(i, _OPERATION, gated).ok]
    for count in counts or COUNTS:
        workload = _workload(count, device)
        parameters = workload.next()
        calls = [_OPERATION.bind(i.functions[_OPERATION.name], parameters, workload.norm) for i in right]
        times: list[list[float]] = [[] for _ in right]
        gc.collect()
        gc.disable()
        try:
            for _ in range(rounds):
                for call, found in zip(calls, times):
                    call()
                    found += [clock(call) for _ in range(_CALLS)]
        finally:
            gc.enable()
        yield [HostTime(i.name, count, round(statistics.median(t), 3)) for i, t in zip(right, times)]


def costs(host: Sequence[HostTime]) -> dict[str, Cost]:
    """Return what each implementation that was measured at both ends costs."""
    us = {(h.impl, h.tensors): h.p50_us for h in host}
    return {
        impl: Cost(at_300, (us[impl, _LAST] - at_300) / (_LAST - _GATED))
        for (impl, tensors), at_300 in us.items()
        if tensors == _GATED and (impl, _LAST) in us
    }


def _workload(count: int, device: torch.device) -> Workload:
    # A cache of one byte: a single copy of the gradients, which stays warm.
    case = Case("host", "one-element tensors", ((1,),) * count)
    return Workload(case, "float32", device, cache_bytes=1)
