"""The backend of Triton kernels: one pass over memory, and no CUDA toolkit on the user's machine.

The kernels find the tensors through a table in device memory, so that a call takes one launch per
dtype in the list, and one more for a norm, whatever its length. See triton_table.py for what a table
is made from, triton_kernels.py for what it holds, triton_workspace.py for where it lives.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradclip_ext.backends.foreach import ForeachBackend
from gradclip_ext.backends.triton_table import CHUNK_BYTES, Listing, Table, TensorList, norm_dtype
from gradclip_ext.backends.triton_workspace import Workspace, workspace_of

if TYPE_CHECKING:
    from gradclip_ext.backends import Backend

_OLDEST_TRITON = (3, 2)  # that of torch 2.6
_OLDEST_CAPABILITY = (7, 0)
# Since then, who launches a compiled kernel passes its constants along, to be skipped.
_LAUNCHER_TAKES_CONSTANTS = (3, 3)

_LANES = 128
_VEC_BYTES = 16
# Vectors that a lane has in flight. 8 take 100 registers in norm_kernel for half types, so that 4
# programs fit on an SM of an H100: 64 KiB in flight, where its memory latency asks for about 40.
# The kernels that also write need half the registers and are as far with 4 vectors.
_NORM_VECS = 8
_CHANGE_VECS = 4
# finish_kernel runs on one SM and needs many loads in flight there.
_FINISH_LANES = 512
_FINISH_BLOCK = 4096


class CompileError(RuntimeError):
    """Triton cannot compile or load a kernel here. Nothing has been launched or written."""


@dataclasses.dataclass
class _Launch:
    """A launch on one table: all but the arguments that change from call to call.

    Those come first in the kernels' signatures. ``start`` takes them and launches the binary that
    has been found for the others.
    """

    # Triton spends 18 us of host time to find the binary that fits a launch, and 3 to launch it.

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    start: Callable[..., None] | None = None


# A launch and the arguments that this call gives it.
_Call = tuple[_Launch, tuple[Any, ...]]


class TritonBackend:
    """Triton kernels on CUDA and ROCm devices, and on CPU tensors in Triton's interpreter.

    A kernel is compiled when it is first needed, a second or so; Triton needs a C compiler for
    what launches it. Before a CUDA graph is captured, run the same calls once.

    Args:
        fallback: what serves instead, after one warning, once Triton has failed to compile a
            kernel: for the automatic choice, which leaves the interpreter alone, too. None
            raises, for callers who have named this backend.
    """

    name = "triton"

    def __init__(self, fallback: Backend | None = None) -> None:
        self._fallback = fallback
        self._others = ForeachBackend()
        self._reasons: dict[torch.device, str | None] = {}
        self._kernels: Any = None
        self._interpreted = False
        self._launcher_takes_constants = True
        self._binaries: dict[tuple[Any, ...], Any] = {}

    # ------------------------------------------------------------ verbs

    def norm(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        if not norm_type > 0.0:
            return self._others.norm(tensors, norm_type)
        try:
            norm, irregular = self.total_norm(TensorList(tensors), norm_type, torch.float64)
        except CompileError as error:
            return self._instead(error, tensors[0].device).norm(tensors, norm_type)
        if not irregular:
            return norm
        return _joined(norm, self._others.norm([tensors[i] for i in irregular], norm_type), norm_type)

    def clip_norm_(self, grads: Sequence[Tensor], max_norm: float, norm_type: float) -> Tensor | None:
        """Return the norm in its public dtype and scale by the coefficient that follows from it.

        Compares the list with its table once, where norm and scale_ do so each, and spares the five
        small kernels that torch takes for the coefficient. None if nothing has been done, because
        the kernels do not take the whole list or cannot be compiled.
        """
        return self.clip_listed_(TensorList(grads), max_norm, norm_type)

    def scale_(self, grads: Sequence[Tensor], clip_coef: Tensor) -> None:
        try:
            left = self.scale_listed_(TensorList(grads), clip_coef)
        except CompileError as error:
            self._instead(error, clip_coef.device).scale_(grads, clip_coef)
            return
        if left is None:
            self._others.scale_(grads, clip_coef)
        elif left:
            self._others.scale_([grads[i] for i in left], clip_coef)

    def clamp_(self, grads: Sequence[Tensor], min: float, max: float) -> None:
        try:
            irregular = self.clamp_listed_(TensorList(grads), min, max)
        except CompileError as error:
            self._instead(error, grads[0].device).clamp_(grads, min, max)
            return
        if irregular:
            self._others.clamp_([grads[i] for i in irregular], min, max)

    # ------------------------------------------------------------ on lists that are read already

    def total_norm(self, listing: Listing, norm_type: float, dtype: torch.dtype) -> tuple[Tensor, list[int]]:
        """Return the norm, for p > 0, of all tensors but some, and the places of those."""
        norm = torch.empty((), dtype=dtype, device=listing.device)
        with workspace_of(listing.device) as workspace:
            table = workspace.table(listing)
            self._enqueue(self._norm_calls(workspace, table, norm_type, norm))
        return norm, table.irregular

    def clip_listed_(self, listing: Listing, max_norm: float, norm_type: float) -> Tensor | None:
        """Do as :meth:`clip_norm_` does."""
        if not norm_type > 0.0:
            return None
        try:
            with workspace_of(listing.device) as workspace:
                table = workspace.table(listing)
                if not table.groups or table.irregular or table.overlap(listing):
                    return None
                norm = torch.empty((), dtype=norm_dtype(listing), device=listing.device)
                if math.isinf(max_norm):  # only report: even a NaN norm must not scale
                    calls = self._norm_calls(workspace, table, norm_type, norm)
                else:
                    clip_coef = workspace.clip_coef(norm.dtype)
                    calls = self._norm_calls(workspace, table, norm_type, norm, clip_coef, max_norm)
                    calls += self._scale_calls(workspace, table, clip_coef)
                self._enqueue(calls)
        except CompileError:
            return None
        listing.bump_versions()
        return norm

    def scale_listed_(self, listing: Listing, clip_coef: Tensor) -> list[int] | None:
        """Scale all tensors but some and return the places of those; None if none could be, because
        some share memory and have to be scaled in their order."""
        with workspace_of(listing.device) as workspace:
            table = workspace.table(listing)
            if table.overlap(listing):
                return None
            self._enqueue(self._scale_calls(workspace, table, clip_coef))
        listing.bump_versions()
        return table.irregular

    def clamp_listed_(self, listing: Listing, min: float, max: float) -> list[int]:
        """Clamp all tensors but some and return the places of those."""
        with workspace_of(listing.device) as workspace:
            table = workspace.table(listing)
            self._enqueue(self._clamp_calls(workspace, table, min, max))
        listing.bump_versions()
        return table.irregular

    # ------------------------------------------------------------ launches

    def _norm_calls(
        self,
        workspace: Workspace,
        table: Table,
        norm_type: float,
        norm: Tensor,
        clip_coef: Tensor | None = None,
        max_norm: float = 0.0,
    ) -> list[_Call]:
        """Return the launches that write the norm and, given room for one, the coefficient."""
        key = "norm", norm_type, norm.dtype, clip_coef is None
        if key not in table.launches:
            order = norm_type if norm_type in (1.0, 2.0, math.inf) else 0.0
            partials, p = workspace.partials(table.chunks), _bits(norm_type)

            def shape(vec: int) -> dict[str, Any]:
                return {"ORDER": order, "ROWS": _NORM_VECS, "COLS": _LANES * vec}

            launches = self._over_groups("norm_kernel", (partials, p), shape, workspace, table)
            finish = _Launch(
                self._kernels.finish_kernel,
                1,
                (partials, p, table.chunks),
                {"ORDER": order, "BLOCK": _FINISH_BLOCK},
                _options(_FINISH_LANES, workspace),
            )
            table.launches[key] = [*launches, finish]
        *launches, finish = table.launches[key]
        return [*((launch, ()) for launch in launches), (finish, (norm, clip_coef, _bits(max_norm)))]

    def _scale_calls(self, workspace: Workspace, table: Table, clip_coef: Tensor) -> list[_Call]:
        key = "scale", clip_coef.dtype
        if key not in table.launches:
            table.launches[key] = self._over_groups("scale_kernel", (), _tile_of_rows, workspace, table)
        return [(launch, (clip_coef,)) for launch in table.launches[key]]

    def _clamp_calls(self, workspace: Workspace, table: Table, min: float, max: float) -> list[_Call]:
        key = ("clamp",)
        if key not in table.launches:
            table.launches[key] = self._over_groups("clamp_kernel", (), _tile_of_rows, workspace, table)
        bounds = _bits(min), _bits(max)
        given = [tuple(_rounded(bits, group.dtype) for bits in bounds) for group in table.groups]
        return list(zip(table.launches[key], given))

    def _over_groups(
        self,
        kernel: str,
        arguments: tuple[Any, ...],
        shape_for: Callable[[int], dict[str, Any]],
        workspace: Workspace,
        table: Table,
    ) -> list[_Launch]:
        """Return one launch per dtype; ``shape_for`` is told how many elements 16 bytes hold."""
        launches = []
        for group in table.groups:
            itemsize = group.dtype.itemsize
            launch = _Launch(
                getattr(self._kernels, kernel),
                min(group.chunks, workspace.programs),
                (table.on_device, *arguments, group.first, group.last),
                {
                    "DTYPE": getattr(self._kernels.tl, str(group.dtype).removeprefix("torch.")),
                    **shape_for(_VEC_BYTES // itemsize),
                    "CHUNK": CHUNK_BYTES // itemsize,
                    "CHUNK_BYTES": CHUNK_BYTES,
                },
                _options(_LANES, workspace),
            )
            launches.append(launch)
        return launches

    def _enqueue(self, calls: Sequence[_Call]) -> None:
        """Compile and load all that is new, then launch: a failure finds everything untouched."""
        for launch, given in calls:
            if launch.start is None:
                launch.start = self._start_of(launch, given)
        for launch, given in calls:
            assert launch.start is not None
            launch.start(*given)

    def _start_of(self, launch: _Launch, given: tuple[Any, ...]) -> Callable[..., None]:
        """Return what launches, given the arguments that change."""
        kernel, arguments, named = launch.kernel, launch.arguments, {**launch.constants, **launch.options}
        if self._interpreted:
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
        if self._launcher_takes_constants:
            arguments = *arguments, *launch.constants.values()
        return lambda *given: start(*given, *arguments)

    def _instead(self, error: CompileError, device: torch.device) -> Backend:
        """Return the fallback, with a warning the first time; raise the error if there is none."""
        if self._fallback is None:
            raise error
        if self._reasons.get(device) is None:
            self._reasons[device] = str(error)
            warnings.warn(
                f"{error}\nbackend={self._fallback.name!r} serves from now on", RuntimeWarning, stacklevel=2
            )
        return self._fallback

    # ------------------------------------------------------------ where it runs

    def unusable(self, device: torch.device) -> str | None:
        if device not in self._reasons:
            self._reasons[device] = self._why_not(device)
        return self._reasons[device]

    def _why_not(self, device: torch.device) -> str | None:
        if device.type not in ("cuda", "cpu"):
            return f"its kernels have been written for CUDA and ROCm devices, not for {device.type}"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA or ROCm device"
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
            return "the CPU is served under TRITON_INTERPRET=1 only, for tests"
        if device.type == "cpu" and self._fallback is not None:
            return "Triton's interpreter is slow and has to be asked for by name"
        try:
            return self._load(device)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "triton":
                return "Triton is not installed: pip install triton"
            return f"Triton cannot be used here: {type(error).__name__}: {error}"

    def _load(self, device: torch.device) -> str | None:
        """Import Triton and the kernels; return why they do not fit the device, or None."""
        triton = importlib.import_module("triton")
        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if version < _OLDEST_TRITON:
            oldest = ".".join(map(str, _OLDEST_TRITON))
            return f"Triton {triton.__version__} is too old: {oldest} or later is needed"
        self._launcher_takes_constants = version >= _LAUNCHER_TAKES_CONSTANTS
        self._kernels = importlib.import_module("gradclip_ext.backends.triton_kernels")
        self._interpreted = not isinstance(self._kernels.norm_kernel, triton.JITFunction)
        if device.type == "cpu":
            if not self._interpreted:
                return "TRITON_INTERPRET was set after Triton had been imported"
            # Interpreters of Triton have failed on a NumPy newer than themselves.
            self.norm([torch.ones(1, dtype=torch.float32, device="cpu")], 2.0)
        elif self._interpreted:
            return "TRITON_INTERPRET is set, and the interpreter cannot read GPU memory"
        elif torch.version.hip is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < _OLDEST_CAPABILITY:
                return f"compute capability 7.0 is needed, this device has {capability[0]}.{capability[1]}"
        return None


def _tile_of_rows(vec: int) -> dict[str, Any]:
    """Return the shape of a tile whose rows are the 16 bytes that are stored together or not at all."""
    return {"ROWS": _CHANGE_VECS * _LANES, "COLS": vec, "BLOCK": _LANES * vec}


def _options(lanes: int, workspace: Workspace) -> dict[str, Any]:
    """Return how to compile for programs of so many lanes.

    Triton's own choice whether to fuse products into sums changes with 3.10, and the bits with it.
    """
    return {"num_warps": lanes // workspace.warp_size, "enable_fp_fusion": True}


@functools.lru_cache
def _rounded(bits: int, dtype: torch.dtype) -> int:
    """Return the bits of a bound rounded to the dtype by torch, as its own clamp does.

    Of bits, because to a cache 0.0 and -0.0 are the same.
    """
    number = torch.tensor(bits, dtype=torch.int64, device="cpu").view(torch.float64)
    return _bits(number.to(dtype).item())


def _bits(number: float) -> int:
    """Return the bits of a float64 as an integer."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


def _joined(norm: Tensor, other: Tensor, p: float) -> Tensor:
    """Return the norm of two norms; divided by the larger one, no power leaves the range."""
    norms = torch.stack([norm, other.double()])
    most = norms.amax()
    total = most * torch.linalg.vector_norm(norms / most, p)
    return torch.where((most > 0.0) & (most < math.inf), total, most)
