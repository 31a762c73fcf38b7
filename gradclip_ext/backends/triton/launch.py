"""Launches of Triton kernels: compiled and loaded once, then started with what changes from call to call."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext.backends.triton.memory import CHUNK_BYTES, Table, Workspace

_OLDEST_TRITON = (3, 2)  # that of torch 2.6
# Since then, who launches a compiled kernel passes its constants along, to be skipped.
_LAUNCHER_TAKES_CONSTANTS = (3, 3)

_LANES = 128
_VEC_BYTES = 16


class CompileError(RuntimeError):
    """Triton cannot compile or load a kernel here. Nothing has been launched or written."""


@dataclasses.dataclass
class Launch:
    """A launch on one table: all but the arguments that change from call to call.

    Those come first in the kernels' signatures. ``start`` is called with them and launches the binary that
    fits all the rest.
    """

    # Triton spends 18 us of host time to find the binary that fits a launch, and 3 to launch it.

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    start: Callable[..., None] | None = None


# A launch and the arguments that this call gives it.
Call = tuple[Launch, tuple[Any, ...]]


class Launcher:
    """Triton and the kernels of kernels.py, once they are loaded.

    ``kernels`` is the module of kernels; ``is_interpreted`` tells that TRITON_INTERPRET was set when it was
    imported.
    """

    def __init__(self) -> None:
        self.kernels: Any = None
        self.is_interpreted = False
        self._takes_constants = True
        self._binaries: dict[tuple[Any, ...], Any] = {}

    def load(self) -> str | None:
        """Import Triton and the kernels; return why they cannot be used, or None."""
        triton = importlib.import_module("triton")
        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if version < _OLDEST_TRITON:
            oldest = ".".join(map(str, _OLDEST_TRITON))
            return f"Triton {triton.__version__} is too old: {oldest} or later is needed"
        self._takes_constants = version >= _LAUNCHER_TAKES_CONSTANTS
        self.kernels = importlib.import_module("gradclip_ext.backends.triton.kernels")
        self.is_interpreted = not isinstance(self.kernels.norm_kernel, triton.JITFunction)
        return None

    def over_groups(
        self,
        kernel: str,
        arguments: tuple[Any, ...],
        shape_for: Callable[[int], dict[str, Any]],
        workspace: Workspace,
        table: Table,
    ) -> list[Launch]:
        """Return one launch per dtype; ``shape_for`` is told how many elements 16 bytes hold."""
        launches = []
        for group in table.groups:
            itemsize = group.dtype.itemsize
            launch = Launch(
                getattr(self.kernels, kernel),
                min(group.chunks, workspace.programs),
                (table.on_device, *arguments, group.first, group.last),
                {
                    "DTYPE": getattr(self.kernels.tl, str(group.dtype).removeprefix("torch.")),
                    **shape_for(_VEC_BYTES // itemsize),
                    "CHUNK": CHUNK_BYTES // itemsize,
                    "CHUNK_BYTES": CHUNK_BYTES,
                },
                options(_LANES, workspace),
            )
            launches.append(launch)
        return launches

    def enqueue(self, calls: Sequence[Call]) -> None:
        """Compile and load all that is new, then launch: a failure finds everything untouched."""
        for launch, given in calls:
            if launch.start is None:
                launch.start = self._start_of(launch, given)
        for launch, given in calls:
            assert launch.start is not None
            launch.start(*given)

    def _start_of(self, launch: Launch, given: tuple[Any, ...]) -> Callable[..., None]:
        """Return what launches, given the arguments that change."""
        kernel, arguments, named = launch.kernel, launch.arguments, {**launch.constants, **launch.options}
        if self.is_interpreted:
            return lambda *given: kernel[(launch.programs,)](*given, *arguments, **named)
        what = f"{kernel.__name__} for {named}"
        # All that a binary depends on: addresses in arguments are an allocator's, or not specialised on.
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        dtypes = [a.dtype for a in given if isinstance(a, Tensor)]
        key = (kernel.__name__, device, *dtypes, *launch.constants.values())
        try:
            if key not in self._binaries:
                self._binaries[key] = kernel.warmup(*given, *arguments, **named, grid=(1,))
            start = self._binaries[key][(launch.programs, 1, 1)]  # loads it, as in Triton's tutorials
        except Exception as error:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(  # no CompileError: nothing is wrong with Triton
                    f"{what} has to be loaded before a CUDA graph is captured: run the same calls once before"
                ) from error
            raise CompileError(f"Triton failed to compile {what}: {type(error).__name__}: {error}") from error
        if self._takes_constants:
            arguments = *arguments, *launch.constants.values()
        return lambda *given: start(*given, *arguments)


def options(lanes: int, workspace: Workspace) -> dict[str, Any]:
    """Return how to compile for programs of so many lanes.

    Triton's own choice whether to fuse products into sums changes with 3.10, and the bits with it.
    """
    return {"num_warps": lanes // workspace.warp_size, "enable_fp_fusion": True}


def tile_of(rows: int, vec: int) -> dict[str, Any]:
    """Return the shape of a tile for a sum: ``rows`` vectors of ``vec`` elements a lane."""
    return {"ROWS": rows, "COLS": _LANES * vec}


def tile_of_vectors(rows: int, vec: int) -> dict[str, Any]:
    """Return the shape of a tile whose rows are the 16 bytes that are stored together or not at all."""
    return {"ROWS": rows * _LANES, "COLS": vec, "BLOCK": _LANES * vec}


@functools.lru_cache
def rounded_bits(bits: int, dtype: torch.dtype) -> int:
    """Return the bits of a bound rounded to the dtype by torch, as its own clamp does.

    Of bits, because to a cache 0.0 and -0.0 are the same.
    """
    number = torch.tensor(bits, dtype=torch.int64, device="cpu").view(torch.float64)
    return bits_of(number.to(dtype).item())


def bits_of(number: float) -> int:
    """Return the bits of a float64 as an integer."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits
