"""Launches of Triton kernels: compiled once, then launched with the arguments that change between calls."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import struct
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from gradclip_ext.backends.triton.memory import CHUNK_BYTES, Table, Workspace
from gradclip_ext.backends.triton.units import UnitTable

_OLDEST_TRITON = (3, 2)  # torch 2.6 comes with it
# From this version on, a compiled kernel is launched with its constants, too, which it ignores.
_LAUNCHER_TAKES_CONSTANTS = (3, 3)

_KERNEL_MODULES = ("kernels", "finalize_kernels", "update_kernels", "segment_kernels", "adaptive_kernels")

_LANES = 128
_VEC_BYTES = 16


class CompileError(RuntimeError):
    """Triton cannot compile or load a kernel here. Nothing has been launched or written."""


@dataclasses.dataclass
class Launch:
    """A launch on one table: everything but the arguments that change between calls.

    Those come first in the kernels' signatures. ``start`` is called with them and launches the binary. It is
    kept to save host time: Triton takes 18 us to look up the binary of a launch, and 3 us to launch it.
    """

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    start: Callable[..., None] | None = None


# A launch and the arguments of this call, which ``start`` is called with.
Call = tuple[Launch, tuple[Any, ...]]


class Launcher:
    """Triton and the kernels, once they are loaded.

    ``kernels`` has the kernels of all modules, and ``tl``, triton.language. ``is_interpreted`` is True if
    TRITON_INTERPRET was set when they were imported.
    """

    def __init__(self) -> None:
        self.kernels: Any = None
        self.is_interpreted: bool = False
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
        self.kernels = SimpleNamespace()
        for module in _KERNEL_MODULES:
            names = vars(importlib.import_module(f"gradclip_ext.backends.triton.{module}"))
            found = {name: names[name] for name in names if name == "tl" or name.endswith("_kernel")}
            vars(self.kernels).update(found)
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
        """Return one launch per dtype.

        ``shape_for`` maps the number of elements in 16 bytes to the constants that are a tile's shape.
        """
        launches = []
        for group in table.groups:
            itemsize = group.dtype.itemsize
            launch = Launch(
                getattr(self.kernels, kernel),
                min(group.chunks, workspace.programs),
                (table.on_device, *arguments, group.first, group.last),
                {
                    "DTYPE": self._dtype(group.dtype),
                    **shape_for(_VEC_BYTES // itemsize),
                    "CHUNK": CHUNK_BYTES // itemsize,
                    "CHUNK_BYTES": CHUNK_BYTES,
                },
                options(_LANES, workspace),
            )
            launches.append(launch)
        return launches

    def over_units(self, order: float, p: int, workspace: Workspace, table: UnitTable) -> list[Launch]:
        """Return one launch of adaptive_kernel for each group of tensors with similar units."""
        return [
            Launch(
                self.kernels.adaptive_kernel,
                min(group.runs, workspace.programs),
                (table.on_device, table.weights, p, group.first, group.last),
                {
                    "DTYPE": self._dtype(group.dtype),
                    "WEIGHT": self._dtype(group.weight_dtype),
                    "ORDER": order,
                    **group.tile,
                },
                options(_LANES, workspace),
            )
            for group in table.groups
        ]

    def _dtype(self, dtype: torch.dtype) -> Any:
        return getattr(self.kernels.tl, str(dtype).removeprefix("torch."))

    def enqueue(self, calls: Sequence[Call]) -> None:
        """Compile and load everything new, then launch: if that fails, no gradient has changed."""
        for launch, changing in calls:
            if launch.start is None:
                launch.start = self._start_of(launch, changing)
        for launch, changing in calls:
            assert launch.start is not None
            launch.start(*changing)

    def _start_of(self, launch: Launch, changing: tuple[Any, ...]) -> Callable[..., None]:
        """Return the function that launches, called with the arguments that change."""
        kernel, arguments, named = launch.kernel, launch.arguments, {**launch.constants, **launch.options}
        if self.is_interpreted:
            return lambda *changing: kernel[(launch.programs,)](*changing, *arguments, **named)
        what = f"{kernel.__name__} for {named}"
        # All that a binary depends on. Addresses are not: an allocator aligns them, or Triton ignores them.
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        dtypes = [getattr(a, "dtype", type(a)) for a in changing]
        key = (kernel.__name__, device, *dtypes, *launch.constants.values())
        try:
            if key not in self._binaries:
                self._binaries[key] = kernel.warmup(*changing, *arguments, **named, grid=(1,))
            start = self._binaries[key][(launch.programs, 1, 1)]  # loads the binary, as in Triton's tutorials
        except Exception as error:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(  # not a CompileError: Triton itself works
                    f"{what} has to be loaded before a CUDA graph is captured: run the same calls once before"
                ) from error
            raise CompileError(f"Triton failed to compile {what}: {type(error).__name__}: {error}") from error
        if self._takes_constants:
            arguments = *arguments, *launch.constants.values()
        return lambda *changing: start(*changing, *arguments)


def options(lanes: int, workspace: Workspace) -> dict[str, Any]:
    """Return the compile options for programs of ``lanes`` threads.

    FP fusion is set explicitly: Triton's default changes with 3.10, and the bits of results with it.
    """
    return {"num_warps": lanes // workspace.warp_size, "enable_fp_fusion": True}


def tile_of(rows: int, vec: int) -> dict[str, Any]:
    """Return the shape of a tile for a sum: ``rows`` vectors of ``vec`` elements a lane."""
    return {"ROWS": rows, "COLS": _LANES * vec}


def tile_of_vectors(rows: int, vec: int) -> dict[str, Any]:
    """Return the shape of a tile with rows of 16 bytes, each of which is stored or skipped as one."""
    return {"ROWS": rows * _LANES, "COLS": vec}


@functools.lru_cache
def rounded_bits(bits: int, dtype: torch.dtype) -> int:
    """Return the bits of a bound that torch has rounded to the dtype, as torch.clamp does.

    The argument is bits, too, because the cache takes 0.0 and -0.0 for the same number.
    """
    number = torch.tensor(bits, dtype=torch.int64, device="cpu").view(torch.float64)
    return bits_of(number.to(dtype).item())


def bits_of(number: float) -> int:
    """Return the bits of a float64 as an integer."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits
