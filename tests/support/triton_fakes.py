"""Kernels that record their compilations and launches, to test the triton backend without Triton."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from gradclip_ext.backends.triton import TritonBackend


class FakeKernel:
    """Records compilations and launches; ``fails`` tells for which constants they fail."""

    def __init__(
        self, name: str, log: list[tuple[str, str, tuple]], fails: Any = lambda constants: False
    ) -> None:
        self.__name__ = name
        self._log, self._fails = log, fails

    def warmup(self, *args: Any, grid: Any, **constants: Any) -> Any:
        self._log.append(("compile", self.__name__, args))
        return FakeBinary(self, self._fails(constants))

    def launch(self, *args: Any) -> None:
        self._log.append(("launch", self.__name__, args))


class FakeBinary:
    def __init__(self, kernel: FakeKernel, fails: bool) -> None:
        self._kernel, self._fails = kernel, fails

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        if self._fails:
            raise RuntimeError("no such instruction")
        return self._kernel.launch


KERNELS = ("norm_kernel", "finalize_kernel", "scale_kernel", "clamp_kernel")
# Those with a result or a coefficient for each tensor or unit.
SEGMENT_KERNELS = (
    "finalize_each_kernel",
    "scale_each_kernel",
    "statistics_kernel",
    "finalize_statistics_kernel",
    "adaptive_kernel",
)


def with_fake_kernels(
    log: list, fallback: Any = None, fails: Any = lambda constants: False, kind: type[FakeKernel] = FakeKernel
) -> TritonBackend:
    """Return a triton backend that records in ``log`` what it has compiled and launched."""
    backend = TritonBackend(fallback)
    kernels = {name: kind(name, log, fails) for name in (*KERNELS, *SEGMENT_KERNELS)}
    backend._launcher.kernels = SimpleNamespace(tl=torch, **kernels)
    return backend


def launches(log: list) -> list[str]:
    return [name for what, name, _ in log if what == "launch"]
