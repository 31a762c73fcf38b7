"""How long one operation takes in each implementation: interleaved calls, medians, ratios pair by pair."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import clocks
from benchmarks.clocks import Clock
from benchmarks.implementations import Implementation
from benchmarks.operations import Operation
from benchmarks.workload import Workload

# Fewer give no median worth the name; more than the second no better one.
ENOUGH_REPEATS, _MOST_REPEATS = 10, 200
_HOST_REPEATS = 20


@dataclass(frozen=True)
class Timing:
    """Times of one implementation.

    Args:
        us: microseconds of each repeat; the same index in two Timings means side by side.
        host_us: median time until the call returns with an idle GPU; None on a CPU.
        launches: kernels, copies and fills the GPU was given; None on a CPU.
        scratch_bytes: peak GPU memory beyond what was there before; None on a CPU.
    """

    us: list[float]
    host_us: float | None
    launches: int | None
    scratch_bytes: int | None

    def ratios_to(self, other: Timing) -> list[float]:
        """Return ``other``'s times over these, repeat by repeat.

        Whatever slows the machine down for a moment hits both halves of a pair, so their
        median is steadier than the ratio of two medians.
        """
        return [theirs / ours for theirs, ours in zip(other.us, self.us)]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile by linear interpolation."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def measure(
    implementations: Sequence[Implementation],
    operation: Operation,
    workload: Workload,
    *,
    repeats: int | None,
    seconds: float,
) -> list[Timing]:
    """Time one operation in every implementation, turn by turn in one process.

    Args:
        implementations: who; they take turns, starting with a different one each time.
        operation: what. Gradients that a call wrote to are restored after it, untimed, so
            that every repeat of "clipped" does clip.
        workload: on which gradients; their device decides on the clock.
        repeats: how many calls of each, or None for as many as fit in ``seconds``.
        seconds: how long to go on when repeats is None: 200 repeats at most, and 10 at least
            however long they take.
    """
    functions = [implementation.functions[operation.name] for implementation in implementations]

    def turn(clock_of: list[Clock], first: int) -> list[float]:
        times = [0.0] * len(functions)
        for step in range(len(functions)):
            index = (first + step) % len(functions)
            parameters = workload.next()
            call = operation.bind(functions[index], parameters, workload.norm)
            workload.cool()
            times[index] = clock_of[index](call)
            if operation.state == "clipped":
                workload.restore(parameters)
        return times

    def turns(clock_of: list[Clock], count: int) -> list[list[float]]:
        rows = [turn(clock_of, first) for first in range(count)]
        return [list(column) for column in zip(*rows)]

    def turns_for(clock_of: list[Clock], seconds: float) -> list[list[float]]:
        start = time.monotonic()
        rows: list[list[float]] = []
        while len(rows) < _MOST_REPEATS:
            rows.append(turn(clock_of, len(rows)))
            if time.monotonic() - start > seconds and len(rows) >= ENOUGH_REPEATS:
                break
        return [list(column) for column in zip(*rows)]

    # The collector would walk through every parameter object in the middle of somebody's turn.
    gc.collect()
    gc.disable()
    try:
        host: list[float | None] = [None] * len(functions)
        device_clocks = [clocks.device_clock(workload.device)] * len(functions)
        if workload.device.type == "cuda":
            host_clocks: list[Clock] = [clocks.host_us] * len(functions)
            turn(host_clocks, 0)
            medians = [statistics.median(times) for times in turns(host_clocks, _HOST_REPEATS)]
            device_clocks = [clocks.device_clock(workload.device, median) for median in medians]
            host = [*medians]
        turn(device_clocks, 0)  # warms up
        times = turns(device_clocks, repeats) if repeats else turns_for(device_clocks, seconds)
    finally:
        gc.enable()
    counts = [_count(operation, function, workload) for function in functions]
    return [Timing(us, h, launches, scratch) for us, h, (launches, scratch) in zip(times, host, counts)]


def _count(
    operation: Operation, function: Callable[..., Any], workload: Workload
) -> tuple[int | None, int | None]:
    """Return launches and peak scratch bytes of one call on a GPU."""
    if workload.device.type != "cuda":
        return None, None
    parameters = workload.next()
    call = operation.bind(function, parameters, workload.norm)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    scratch = torch.cuda.max_memory_allocated() - before
    workload.restore(parameters)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    workload.restore(parameters)
    launches = sum(event.device_type == DeviceType.CUDA for event in recorded.events())
    return launches, scratch
