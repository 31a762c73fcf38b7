"""Clocks: microseconds that one call takes, on the device or on the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
Clock = Callable[[Call], float]

# torch.cuda._sleep counts cycles; at 2 per ns it lasts at least as long as asked on any GPU below 2 GHz
# and nearly so on the others.
_CYCLES_PER_US = 2000


def device_clock(device: torch.device, host_us: float = 100.0) -> Clock:
    """Return the clock for the work itself: CUDA events on a GPU, the wall on a CPU.

    Args:
        device: where the call works.
        host_us: on a GPU, how long the host needs to launch the call. The GPU is kept asleep
            that long, twice over, so that all launches are queued when the first one runs: what
            is measured is device time, as in training, where backward keeps the queue full. A
            call that waits for the GPU cannot hide that wait here.
    """
    if device.type != "cuda":
        return wall_us
    lead = int((2 * host_us + 20) * _CYCLES_PER_US)

    def event_us(call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(lead)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    return event_us


def wall_us(call: Call) -> float:
    """Return the time until the call returns."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def host_us(call: Call) -> float:
    """Return the time until the call returns to a host whose GPU has nothing else to do."""
    torch.cuda.synchronize()
    elapsed = wall_us(call)
    torch.cuda.synchronize()
    return elapsed
