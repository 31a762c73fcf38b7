"""``python -m benchmarks.distributed``: clip sharded gradients, torch against this package, on gloo ranks.

Every rank is a process. Two kinds of lists: many small DTensors, whose cost is the host's, and the shards of
GPT-2, whose cost is memory traffic. Timed are the first call on a new set of gradients, later calls, and the
call after one gradient became None; counted are the collectives of a call and their bytes.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.multiprocessing.spawn import spawn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

import gradclip_ext
from benchmarks import contenders, distributed_results, machine
from benchmarks.cases import CASES
from benchmarks.contenders import BASELINE
from benchmarks.distributed_results import HEADER, OURS, ShardedRecord, row
from benchmarks.plan import OUT, command_line, positive

_EXAMPLES = """examples:
  python -m benchmarks.distributed --ranks 1 --counts 148 300    a minute
  python -m benchmarks.distributed                               everything, on two cores in half an hour

Exit status 1 if a norm of ours is off by more than 1e-6.
"""
_NORM_TOLERANCE = 1e-6
# The local shape of the small tensors: what a call costs is then the host's.
_SMALL = (8, 8)
# torch's first call on a new set of gradients takes time quadratic in their number. A call that is expected
# to take longer is not measured, and the file says so.
_LONGEST_S = 90.0


# ---------------------------------------------------------------- one rank


class Collectives(TorchDispatchMode):
    """Counts the collectives of this rank, and the bytes of their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # seen again as the operations on local tensors that it consists of
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            self.count += 1
            inputs = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.bytes += sum(t.nbytes for t in inputs)
        return func(*args, **(kwargs or {}))


Clip = Callable[[Sequence[Parameter], float], Tensor]


class Rank:
    """Measures on this process, in step with the others.

    Args:
        clips: torch's function first, then ours.
        seconds: how long to time each list.
    """

    def __init__(self, clips: dict[str, Clip], seconds: float) -> None:
        self._clips = clips
        self._seconds = seconds
        self._first_s: dict[int, float] = {}  # torch's first call, by number of tensors

    def small(self, mesh: DeviceMesh, count: int) -> list[ShardedRecord]:
        """Measure many small tensors, every implementation on gradients of its own."""
        shape = (_SMALL[0] * mesh.size(mesh.ndim - 1), _SMALL[1])
        return self._records(mesh, "8x8", [shape] * count, torch.float32, "unclipped", changes=True)

    def model(self, mesh: DeviceMesh, case: str, dtype: torch.dtype, state: str) -> list[ShardedRecord]:
        """Measure the shards of a model."""
        return self._records(mesh, case, list(CASES[case].shapes), dtype, state, changes=False)

    def _records(
        self,
        mesh: DeviceMesh,
        case: str,
        shapes: list[tuple[int, ...]],
        dtype: torch.dtype,
        state: str,
        changes: bool,
    ) -> list[ShardedRecord]:
        parameters = make(mesh, shapes, dtype)
        oracle = _float64_norm(parameters)
        max_norm = 0.5 * oracle if state == "clipped" else 2.0 * oracle
        common: dict[str, Any] = {
            "ranks": mesh.size(),
            "mesh": list(mesh.shape),
            "case": case,
            "tensors": len(shapes),
            "dtype": str(dtype).removeprefix("torch."),
            "state": state,
        }
        figures: dict[str, dict[str, Any]] = {}
        clips = dict(self._clips)
        expected = self._expected_s(len(shapes)) if changes else 0.0
        if expected > _LONGEST_S:
            del clips[BASELINE]
            problem = f"its first call would take about {expected:.0f} s"
            figures[BASELINE] = {"problem": problem}
        for name, clip in clips.items():
            # torch remembers sets of gradients by their shapes: this one is new to the process.
            first, norm = _timed(partial(clip, parameters, max_norm))
            error = abs(_value(norm) / oracle - 1.0)
            figures[name] = {"first_ms": 1e3 * first, "norm_error": error, **_collectives(clip, parameters)}
            _restore(parameters, oracle)
            if name == BASELINE and changes:
                self._first_s[len(shapes)] = first
        times = self._steady(clips, parameters, max_norm, oracle)
        for name in clips:
            figures[name]["p50_ms"] = 1e3 * median(times[name])
        if BASELINE in times:
            pairs = zip(times[BASELINE], times[OURS])
            figures[OURS]["speedup_vs_torch"] = median(theirs / ours for theirs, ours in pairs)
        if changes:
            parameters[len(parameters) // 2].grad = None
            for name, clip in clips.items():
                figures[name]["gone_ms"] = 1e3 * _timed(partial(clip, parameters, max_norm))[0]
        return [ShardedRecord(**common, impl=name, **figures[name]) for name in self._clips]

    def _expected_s(self, count: int) -> float:
        """Return how long torch's first call will take, from the largest list so far; on every rank alike."""
        largest = max(self._first_s, default=0)
        if largest < 100:  # then it is made of other things
            return 0.0
        return _agreed(self._first_s[largest] * (count / largest) ** 2)

    def _steady(
        self, clips: dict[str, Clip], parameters: list[Parameter], max_norm: float, oracle: float
    ) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in clips}
        started = time.perf_counter()
        while len(times[OURS]) < 5 or _agreed(time.perf_counter() - started) < self._seconds:
            for name, clip in clips.items():
                times[name].append(_timed(partial(clip, parameters, max_norm))[0])
                if max_norm < oracle:
                    _restore(parameters, oracle)
        return times


def make(mesh: DeviceMesh, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Parameter]:
    """Return parameters whose gradients are sharded over the last dimension of the mesh."""
    torch.manual_seed(dist.get_rank())
    size, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    placements: list[Placement] = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    parameters = []
    for shape in shapes:
        rows = [piece.numel() for piece in torch.arange(shape[0]).chunk(size)]
        local = torch.randn(rows[rank] if rank < len(rows) else 0, *shape[1:]).to(dtype)
        grad = DTensor.from_local(local, mesh, placements, shape=torch.Size(shape), stride=_strides(shape))
        parameters.append(Parameter(torch.zeros_like(grad)))
        parameters[-1].grad = grad
    return parameters


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _locals(parameters: Sequence[Parameter]) -> list[Tensor]:
    return [p.grad._local_tensor for p in parameters if isinstance(p.grad, DTensor)]


def _float64_norm(parameters: Sequence[Parameter]) -> float:
    squares = torch.tensor(
        sum(t.double().square().sum().item() for t in _locals(parameters)), dtype=torch.float64
    )
    dist.all_reduce(squares)  # no tensor is on two ranks: the dimension that replicates has size 1
    return float(squares.sqrt())


def _restore(parameters: Sequence[Parameter], oracle: float) -> None:
    """Scale gradients back to their norm, so that the next call has as much to do."""
    factor = oracle / _float64_norm(parameters)
    if abs(factor - 1.0) > 1e-3:
        torch._foreach_mul_(_locals(parameters), factor)


def _value(norm: Tensor) -> float:
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    dist.barrier()
    started = time.perf_counter()
    norm = call()
    return time.perf_counter() - started, norm


def _agreed(seconds: float) -> float:
    """Return rank 0's value."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.broadcast(value, src=0)
    return float(value)


def _collectives(clip: Clip, parameters: list[Parameter]) -> dict[str, int]:
    with Collectives() as seen:
        clip(parameters, math.inf)
    return {"collectives": seen.count, "collective_bytes": seen.bytes}


def worker(rank: int, settings: argparse.Namespace, ranks: int, folder: str) -> None:
    """Measure everything on one rank; rank 0 leaves the records in a file of the folder."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks)
    found, _ = contenders.available(torch.device("cpu"))
    theirs = found[BASELINE].functions["clip_grad_norm_"]
    here = Rank({BASELINE: theirs, OURS: gradclip_ext.clip_grad_norm_}, settings.seconds)
    path = Path(folder, "records.jsonl")
    records: list[ShardedRecord] = []

    def keep(new: list[ShardedRecord]) -> None:
        records.extend(new)
        if rank == 0:
            print("\n".join(map(row, new)), flush=True)
            distributed_results.save(path, {}, records)

    flat = init_device_mesh("cpu", (ranks,))
    here.small(flat, 2)  # for its imports and connections
    for count in settings.counts:
        keep(here.small(flat, count))
    grid = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("replicate", "shard"))
    for count in settings.counts:
        keep(here.small(grid, count))
    for case in settings.models:
        for dtype in (torch.float32, torch.bfloat16):
            for state in ("unclipped", "clipped"):
                keep(here.model(flat, case, dtype, state))
    dist.destroy_process_group()


# ---------------------------------------------------------------- command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line as settings."""
    parser = command_line("benchmarks.distributed", __doc__, _EXAMPLES)
    add = parser.add_argument
    add("--ranks", type=positive, nargs="+", default=[1, 2], help="numbers of processes. Default: 1 2")
    add("--counts", type=positive, nargs="*", default=[148, 300, 2000, 6000], help="of small DTensors")
    add("--models", nargs="*", choices=list(CASES), default=["gpt2-124m"], help="default: gpt2-124m")
    add("--seconds", type=float, default=3.0, help="of timing per list. Default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="default: benchmarks/out/<...>-distributed.jsonl")
    settings = parser.parse_args(argv)
    settings.counts.sort()
    stem = machine.file_name(torch.device("cpu"))
    settings.json = settings.json or OUT / distributed_results.file_name(stem)
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    """Measure on processes of this machine, print and save; return the exit status."""
    settings = parse(argv)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if "lo" in dict(socket.if_nameindex()).values() else "")
    print(HEADER)
    records: list[ShardedRecord] = []
    for ranks in settings.ranks:
        with tempfile.TemporaryDirectory() as folder:
            spawn(worker, args=(settings, ranks, folder), nprocs=ranks)
            records += distributed_results.load(Path(folder, "records.jsonl"))[1]
    block = machine.describe(torch.device("cpu"))
    distributed_results.save(settings.json, block, records)
    distributed_results.draw(block, records, settings.json.with_suffix(".png"))
    print(f"\n{settings.json}")
    wrong = [r for r in records if r.impl == OURS and not (r.norm_error or 0.0) <= _NORM_TOLERANCE]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
