"""Run by test_triton_compiled.py in a process of its own: launch kernels with a driver that only records.

    python triton_launched.py FOLDER

FOLDER holds Triton's cache. Prints one JSON object: for every kernel, whether its launcher gets the same
arguments as from Triton's own way of launching; and the host time of calls on 300 tensors without that of the
driver.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import timeit
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_CACHE_DIR"] = sys.argv[1]

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import gradclip_ext
from gradclip_ext import _extension, backends
from gradclip_ext.backends.base import TensorList
from gradclip_ext.backends.triton import TritonBackend
from gradclip_ext.backends.triton.launch import Launch, Launcher
from gradclip_ext.norms import REPORT, AdaptiveRule, Rule

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
launched: list[tuple[Any, ...]] = []


class DriverLauncher:
    """Replaces the object with which Triton launches a binary: records itself, the grid and the arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        launched.append((self, arguments[:3], arguments[9:]))


driver.set_active(
    SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=DriverLauncher,
        utils=SimpleNamespace(
            load_binary=lambda *args: (1, 1, 1, 0, 1024)[: 5 if VERSION >= (3, 4) else 4],
            get_device_properties=lambda device: {"max_shared_mem": 1 << 18},
        ),
    )
)


class Comparing(Launcher):
    """Launches everything once more in Triton's own way, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.same: dict[str, bool] = {}

    def _start_of(self, launch: Launch, changing: tuple[Any, ...]) -> Any:
        start = super()._start_of(launch, changing)

        def both(*changing: Any) -> None:
            start(*changing)
            named = {**launch.constants, **launch.options}
            launch.kernel[(launch.programs,)](*changing, *launch.arguments, **named)
            (binary, grid, ours), (their_binary, their_grid, theirs) = launched[-2:]
            equal = binary is their_binary and grid == their_grid and len(ours) == len(theirs)
            equal &= all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(ours, theirs))
            name = launch.kernel.__name__
            self.same[name] = self.same.get(name, True) and equal

        return both


def launches_like_triton() -> dict[str, bool]:
    backend = TritonBackend()
    backend._launcher = launcher = Comparing()
    assert launcher.load() is None
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        grads = [torch.ones(40, dtype=dtype), torch.ones(3, dtype=torch.float32)]
        for p in (2.0, 3.0):
            backend.norm(TensorList(grads), p, REPORT, torch.float64)
            for max_norm in (1.0, 0.0, 1e300):
                for result in (torch.float32, torch.float64):
                    backend.norm(TensorList(grads), p, Rule(max_norm), result)
            for result, limit in itertools.product(
                (torch.float32, torch.float64), (1.0, math.inf, torch.ones(3)[1], torch.ones(2))
            ):
                rule = Rule(limit, zero_if_nonfinite=True)
                if not isinstance(limit, Tensor) or not limit.dim():
                    backend.norm(TensorList(grads), p, rule, result)
                backend.clip_each_(TensorList(grads), p, rule, result)
            backend.statistics(TensorList(grads), p)
            backend.clip_adaptive_(TensorList(grads), TensorList(grads), AdaptiveRule(p, 1.0, 0.0))
        coefs = torch.ones(5)
        for coef in (coefs[0], coefs[1], coefs[4]):  # 16 divides the addresses of two of them
            backend.scale_(TensorList(grads), coef)
            backend.scale_(TensorList(grads), coef, may_zero=True)
        backend.scale_(TensorList(grads), coefs[1:3])
        for bound in (1.0, 0.0, 16.0):
            backend.clamp_(TensorList(grads), -bound, bound)
    return launcher.same


def host_us() -> dict[str, float]:
    """Return the time of clip_grad_norm_ with the compiled module and without."""
    parameters = [torch.nn.Parameter(torch.zeros(100, 3)) for _ in range(300)]
    for p in parameters:
        p.grad = torch.randn(100, 3)
    backend = backends.ALL["triton"]
    assert isinstance(backend, TritonBackend) and backend._launcher.load() is None
    backend._reasons[torch.device("cpu")] = None  # it gets addresses of the CPU, but nothing reads them

    def best() -> float:
        def call() -> object:
            return gradclip_ext.clip_grad_norm_(parameters, 1.0, backend="triton")

        call()
        return min(timeit.repeat(call, number=20, repeat=30)) / 20 * 1e6

    found = {"read by the module": best()}
    _extension.C = None
    return {**found, "read by Python": best()}


has_module = _extension.C is not None and _extension.C.CAN_READ
print(json.dumps({"same": launches_like_triton(), "host_us": host_us(), "compiled_module": has_module}))
