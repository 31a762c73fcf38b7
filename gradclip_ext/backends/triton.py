"""The backend of Triton kernels: one pass over memory, and no CUDA toolkit on the user's machine.

The kernels find the tensors through a table in device memory, so that a call takes one launch per
dtype in the list, and one more for a norm, whatever its length. See triton_workspace.py for where
tables live, triton_kernels.py for what they hold.
"""

from __future__ import annotations

import dataclasses
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
from gradclip_ext.backends.triton_workspace import CHUNK_BYTES, Table, Workspace, workspace_of

if TYPE_CHECKING:
    from gradclip_ext.backends import Backend

_OLDEST_TRITON = (3, 2)  # that of torch 2.6
_OLDEST_CAPABILITY = (7, 0)

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


@dataclasses.dataclass(frozen=True)
class _Launch:
    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


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
        self._reasons: dict[str, str | None] = {}
        self._kernels: Any = None
        self._interpreted = False
        self._compiled: set[Any] = set()

    # ------------------------------------------------------------ verbs

    def norm(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        if not norm_type > 0.0:
            return self._others.norm(tensors, norm_type)
        norm = torch.empty((), dtype=torch.float64, device=tensors[0].device)
        try:
            with workspace_of(norm.device) as workspace:
                table = workspace.table(tensors)
                self._enqueue(self._norm_launches(workspace, table, norm_type, norm), norm.device)
        except CompileError as error:
            return self._instead(error, norm.device).norm(tensors, norm_type)
        if not table.irregular:
            return norm
        return _joined(norm, self._others.norm([tensors[i] for i in table.irregular], norm_type), norm_type)

    def clip_norm_(self, grads: Sequence[Tensor], max_norm: float, norm_type: float) -> Tensor | None:
        """Return the norm in its public dtype and scale by the coefficient that follows from it.

        Compares the list with its table once, where norm and scale_ do so each, and spares the five
        small kernels that torch takes for the coefficient. None if nothing has been done, because
        the kernels do not take the whole list or cannot be compiled.
        """
        device = grads[0].device
        try:
            with workspace_of(device) as workspace:
                table = workspace.table(grads)
                if not norm_type > 0.0 or not table.groups or table.irregular or table.overlap(grads):
                    return None
                norm, clip_coef = (torch.empty((), dtype=table.norm_dtype, device=device) for _ in range(2))
                launches = self._norm_launches(
                    workspace, table, norm_type, norm, clip_coef=clip_coef, max_norm=max_norm
                )
                launches += self._scale_launches(workspace, table, clip_coef)
                self._enqueue(launches, device)
        except CompileError:
            return None
        torch.autograd.graph.increment_version(grads)
        return norm

    def scale_(self, grads: Sequence[Tensor], clip_coef: Tensor) -> None:
        try:
            with workspace_of(clip_coef.device) as workspace:
                table = workspace.table(grads)
                in_list_order = table.overlap(grads)
                if not in_list_order:
                    self._enqueue(self._scale_launches(workspace, table, clip_coef), clip_coef.device)
        except CompileError as error:
            self._instead(error, clip_coef.device).scale_(grads, clip_coef)
            return
        if in_list_order:
            self._others.scale_(grads, clip_coef)
            return
        torch.autograd.graph.increment_version(grads)
        if table.irregular:
            self._others.scale_([grads[i] for i in table.irregular], clip_coef)

    def clamp_(self, grads: Sequence[Tensor], min: float, max: float) -> None:
        try:
            with workspace_of(grads[0].device) as workspace:
                table = workspace.table(grads)
                self._enqueue(self._clamp_launches(workspace, table, min, max), workspace.device)
        except CompileError as error:
            self._instead(error, grads[0].device).clamp_(grads, min, max)
            return
        torch.autograd.graph.increment_version(grads)
        if table.irregular:
            self._others.clamp_([grads[i] for i in table.irregular], min, max)

    # ------------------------------------------------------------ launches

    def _norm_launches(
        self,
        workspace: Workspace,
        table: Table,
        norm_type: float,
        norm: Tensor,
        *,
        clip_coef: Tensor | None = None,
        max_norm: float = 0.0,
    ) -> list[_Launch]:
        """Return the launches that write the norm and, given room for one, the coefficient."""
        order = norm_type if norm_type in (1.0, 2.0, math.inf) else 0.0
        partials, p = workspace.partials(table.chunks), _bits(norm_type)

        def constants(vec: int) -> dict[str, Any]:
            return {"ORDER": order, "ROWS": _NORM_VECS, "COLS": _LANES * vec}

        launches = self._over_groups("norm_kernel", lambda dtype: (partials, p), constants, workspace, table)
        finish = (partials, norm, clip_coef, p, _bits(max_norm), table.chunks)
        options = {"ORDER": order, "BLOCK": _FINISH_BLOCK, **_options(_FINISH_LANES, workspace)}
        return [*launches, _Launch(self._kernels.finish_kernel, 1, finish, options)]

    def _scale_launches(self, workspace: Workspace, table: Table, clip_coef: Tensor) -> list[_Launch]:
        given = (clip_coef,)
        return self._over_groups("scale_kernel", lambda dtype: given, _tile_of_rows, workspace, table)

    def _clamp_launches(self, workspace: Workspace, table: Table, min: float, max: float) -> list[_Launch]:
        def given(dtype: torch.dtype) -> tuple[int, int]:
            # Rounded to the dtype by torch, as its own clamp does.
            low, high = torch.tensor([min, max], dtype=dtype, device="cpu").tolist()
            return _bits(low), _bits(high)

        return self._over_groups("clamp_kernel", given, _tile_of_rows, workspace, table)

    def _over_groups(
        self,
        kernel: str,
        given: Callable[[torch.dtype], tuple[Any, ...]],
        constants_for: Callable[[int], dict[str, Any]],
        workspace: Workspace,
        table: Table,
    ) -> list[_Launch]:
        """Return one launch per dtype; ``constants_for`` is told how many elements 16 bytes hold."""
        launches = []
        for group in table.groups:
            itemsize = group.dtype.itemsize
            constants = constants_for(_VEC_BYTES // itemsize)
            constants["DTYPE"] = getattr(self._kernels.tl, str(group.dtype).removeprefix("torch."))
            constants.update(CHUNK=CHUNK_BYTES // itemsize, CHUNK_BYTES=CHUNK_BYTES)
            constants.update(_options(_LANES, workspace))
            arguments = (table.on_device, *given(group.dtype), group.first, group.last)
            programs = min(group.chunks, workspace.programs)
            launches.append(_Launch(getattr(self._kernels, kernel), programs, arguments, constants))
        return launches

    def _enqueue(self, launches: Sequence[_Launch], device: torch.device) -> None:
        """Compile and load all that is new, then launch: a failure finds everything untouched."""
        for launch in launches if not self._interpreted else ():
            dtypes = [a.dtype for a in launch.arguments if isinstance(a, Tensor)]
            key = (id(launch.kernel), device, *dtypes, *launch.constants.values())
            if key not in self._compiled:
                self._compile(launch)
                self._compiled.add(key)
        for launch in launches:
            launch.kernel[(launch.programs,)](*launch.arguments, **launch.constants)

    def _compile(self, launch: _Launch) -> None:
        what = f"{launch.kernel.__name__} for {launch.constants}"
        try:
            compiled = launch.kernel.warmup(*launch.arguments, **launch.constants, grid=(1,))
            compiled._init_handles()  # as Triton's tutorials load what warmup returns
        except Exception as error:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(  # no CompileError: nothing is wrong with Triton
                    f"{what} has to be loaded before a CUDA graph is captured: run the same calls once before"
                ) from error
            raise CompileError(f"Triton failed to compile {what}: {type(error).__name__}: {error}") from error

    def _instead(self, error: CompileError, device: torch.device) -> Backend:
        """Return the fallback, with a warning the first time; raise the error if there is none."""
        if self._fallback is None:
            raise error
        if self._reasons.get(device.type) is None:
            self._reasons[device.type] = str(error)
            warnings.warn(
                f"{error}\nbackend={self._fallback.name!r} serves from now on", RuntimeWarning, stacklevel=2
            )
        return self._fallback

    # ------------------------------------------------------------ where it runs

    def unusable(self, device: torch.device) -> str | None:
        if device.type not in self._reasons:
            self._reasons[device.type] = self._why_not(device.type)
        return self._reasons[device.type]

    def _why_not(self, device_type: str) -> str | None:
        if device_type not in ("cuda", "cpu"):
            return f"its kernels have been written for CUDA and ROCm devices, not for {device_type}"
        if device_type == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA or ROCm device"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
            return "the CPU is served under TRITON_INTERPRET=1 only, for tests"
        if device_type == "cpu" and self._fallback is not None:
            return "Triton's interpreter is slow and has to be asked for by name"
        try:
            return self._load(device_type)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "triton":
                return "Triton is not installed: pip install triton"
            return f"Triton cannot be used here: {type(error).__name__}: {error}"

    def _load(self, device_type: str) -> str | None:
        """Import Triton and the kernels; return why they do not fit the device, or None."""
        triton = importlib.import_module("triton")
        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
            oldest = ".".join(map(str, _OLDEST_TRITON))
            return f"Triton {triton.__version__} is too old: {oldest} or later is needed"
        self._kernels = importlib.import_module("gradclip_ext.backends.triton_kernels")
        self._interpreted = not isinstance(self._kernels.norm_kernel, triton.JITFunction)
        if device_type == "cpu":
            if not self._interpreted:
                return "TRITON_INTERPRET was set after Triton had been imported"
            # Interpreters of Triton have failed on a NumPy newer than themselves.
            self.norm([torch.ones(1, dtype=torch.float32, device="cpu")], 2.0)
        elif self._interpreted:
            return "TRITON_INTERPRET is set, and the interpreter cannot read GPU memory"
        elif torch.version.hip is None:
            devices = range(torch.cuda.device_count())
            capability = min(torch.cuda.get_device_capability(device) for device in devices)
            if capability < _OLDEST_CAPABILITY:
                return f"compute capability 7.0 is needed, a device here has {capability[0]}.{capability[1]}"
        return None


def _tile_of_rows(vec: int) -> dict[str, Any]:
    """Return the shape of a tile whose rows are the 16 bytes that are stored together or not at all."""
    return {"ROWS": _CHANGE_VECS * _LANES, "COLS": vec, "BLOCK": _LANES * vec}


def _options(lanes: int, workspace: Workspace) -> dict[str, Any]:
    """Return how to compile for programs of so many lanes.

    Triton's own choice whether to fuse products into sums changes with 3.10, and the bits with it.
    """
    return {"num_warps": lanes // workspace.warp_size, "enable_fp_fusion": True}


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
