"""The machine: its description, free memory, clocks, and memory bandwidth."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import gradclip_ext

_UNKNOWN_CACHE = 32 << 20
_BANDWIDTH_REPEATS = 4


def describe(device: torch.device) -> dict[str, Any]:
    """Return the ``machine`` block, the bandwidths still to be measured. It names no path, user or host."""
    on_gpu = device.type == "cuda"
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gradclip_ext": gradclip_ext.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "read_gbps": None,
        "inplace_gbps": None,
    }


def file_name(device: torch.device) -> str:
    """Return ``<device>-torch<version>``, the stem of the results file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    return f"{slug}-torch{torch.__version__.split('+')[0]}"


def cache_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache, on a CPU of all cores together: no timed call finds gradients there.

    The last cache of a CPU is not evicted: in training, too, it keeps the gradients of a small model
    from the backward pass to the clipping, and does not hold those of a large one.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    for level in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/level"):
        size = (level.parent / "size").read_text().strip()
        if level.read_text().strip() == "2" and size.endswith("K"):
            return (int(size[:-1]) << 10) * (os.cpu_count() or 1)
    return _UNKNOWN_CACHE


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory is free on the device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = None
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
    group = Path("/sys/fs/cgroup")  # a container's limit does not show in meminfo
    try:
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return left if free is None else min(free, left)


def load() -> float:
    """Return how many processes wanted a core in the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    text = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return text.splitlines()[0] if text else None


def _commit() -> str | None:
    """Return the checkout's commit, marked when the code differs from it."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    # A changed results file is not changed code.
    changed = _output("git", "diff", "--name-only", "HEAD", "--", ":/", ":(exclude,top)benchmarks/results")
    return commit and commit + ("-dirty" if changed else "")


def _output(*command: str) -> str | None:
    try:
        text = subprocess.check_output(
            command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip() or None


# ---------------------------------------------------------------- clocks

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


# ---------------------------------------------------------------- memory bandwidth


class Bandwidths(NamedTuple):
    """GB/s (10^9 bytes) over a buffer far larger than any cache: bytes read, and bytes read plus written."""

    read_gbps: float
    inplace_gbps: float

    def rounded(self) -> dict[str, float]:
        """Return them as the machine block has them."""
        return {"read_gbps": round(self.read_gbps, 2), "inplace_gbps": round(self.inplace_gbps, 2)}


class BandwidthMeter:
    """Measures the memory of a device with the best of several torch operations.

    The bandwidth of a shared machine varies by a factor of four from one minute to another. It is therefore
    measured before every operation, so that a bound holds for that time.
    """

    def __init__(self, device: torch.device) -> None:
        # So large that neither a cache nor, on a GPU, the launch of a kernel affects the result.
        size = max(256 << 20, 4 * cache_bytes(device))
        if device.type == "cuda":
            size = min(2 << 30, (free_bytes(device) or 0) // 4)
        x = torch.ones(size // 4096, 1024, device=device)
        self._size = x.numel() * x.itemsize
        self._clock = device_clock(device)
        self._readers: list[Call] = [x.sum, lambda: torch.dot(x.view(-1), x.view(-1)), lambda: x.amax(dim=1)]
        self._updates: list[Call] = [x.neg_, x.abs_]
        self._measured: list[Bandwidths] = []

    def measure(self) -> Bandwidths:
        """Return what the memory does now."""
        read = self._size / self._best_us(self._readers) / 1e3
        inplace = 2 * self._size / self._best_us(self._updates) / 1e3
        self._measured.append(Bandwidths(read, inplace))
        return self._measured[-1]

    def median(self) -> Bandwidths | None:
        """Return the median of all that was measured, or None if nothing was."""
        if not self._measured:
            return None
        read, inplace = zip(*self._measured)
        return Bandwidths(statistics.median(read), statistics.median(inplace))

    def _best_us(self, calls: list[Call]) -> float:
        return min(self._clock(call) for _ in range(_BANDWIDTH_REPEATS) for call in calls)
