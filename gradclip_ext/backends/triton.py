"""The backend of Triton kernels: one pass at memory speed, and no compiler on the user's machine.

A call looks its list up in a workspace that belongs to (device, stream). The kernels find the
tensors through a table in device memory, so the number of launches depends on the dtypes in the
list, not on its length. See triton_kernels.py for what a table is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import math
import os
import struct
import threading
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradclip_ext.backends.foreach import ForeachBackend, _flat_view, _share_memory

if TYPE_CHECKING:
    from gradclip_ext.backends import Backend

_OLDEST_TRITON = (3, 2)  # that of torch 2.6
_OLDEST_CAPABILITY = (7, 0)

# A program has _WARPS * 32 lanes. The interpreter pays by the operation, and fewer lanes let its
# tests see many chunks in small tensors.
_WARPS = 4
_INTERPRETED_LANES = 32
_VEC_BYTES = 16
# Vectors that a lane has in flight. 8 take 100 registers in norm_kernel for half types, so that 4
# programs fit on an SM of an H100: 64 KiB in flight, where its memory latency asks for about 40.
# The kernels that also write need fewer registers and are as far with 4 vectors and 8 programs.
_NORM_VECS = 8
_CHANGE_VECS = 4
_CHUNK_VECS = 32
_PROGRAMS_PER_SM = 8
_INTERPRETED_PROGRAMS = 3
_FINISH_BLOCK = 1024
# Lists that a workspace remembers, at 24 bytes a tensor: a GAN has two, pointers come and go.
_TABLES = 8
_SLAB_BYTES = 1 << 20


# ---------------------------------------------------------------- tables


@dataclasses.dataclass(frozen=True)
class _Group:
    """The tensors [first, last) of a table, which are of one dtype, and their number of chunks."""

    dtype: torch.dtype
    first: int
    last: int
    chunks: int


class _Table:
    """What the kernels know of one list of tensors, none of which is kept."""

    def __init__(self, key: Any, tensors: Sequence[Tensor], chunk_bytes: int) -> None:
        self.key = key
        self.irregular: list[int] = []
        self.groups: list[_Group] = []
        self.chunks = 0
        self.rows = array("q")
        self._overlap: bool | None = None
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for index, tensor in enumerate(tensors):
            if tensor.is_complex() or _flat_view(tensor) is None:
                self.irregular.append(index)
            elif tensor.numel() > 0:
                by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for dtype, group in by_dtype.items():
            first, before = len(self.rows) // 3, self.chunks
            for tensor in group:
                self.rows.extend((tensor.data_ptr(), tensor.numel(), self.chunks))
                self.chunks += -(-tensor.nbytes // chunk_bytes)
            self.groups.append(_Group(dtype, first, len(self.rows) // 3, self.chunks - before))
        self.rows.extend((0, 0, self.chunks))

    def overlap(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether two of the tensors share memory, so that the order of writing matters."""
        if self._overlap is None:
            self._overlap = _share_memory(tensors)
        return self._overlap


def _key(tensors: Sequence[Tensor]) -> Any:
    """Return all that a table depends on: pointers, sizes, dtypes, and strides where there are gaps.

    0.2 us a tensor. A hash would not do: through a stale pointer the kernels would write.
    """
    return (
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.numel, tensors)),
        [t.dtype for t in tensors],
        [(i, t.shape, t.stride()) for i, t in enumerate(tensors) if not t.is_contiguous()],
    )


# ---------------------------------------------------------------- memory


class _Slab:
    """Page-locked memory for the tables of captured graphs.

    A graph copies its table from there at every replay and gives no notice of its end, so what was
    taken is never reused nor freed: 24 bytes a tensor and capture. It is allocated ahead of time,
    because before torch 2.10 that cannot be done during a capture.
    """

    def __init__(self) -> None:
        self._taken: list[Tensor] = []
        self._left = torch.empty(0, dtype=torch.int64, device="cpu")

    def provide(self, count: int) -> None:
        """Make sure that ``count`` integers can be taken."""
        if self._left.numel() < count:
            size = max(count, _SLAB_BYTES // 8)
            self._left = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)

    def take(self, count: int) -> Tensor:
        self.provide(count)
        self._taken.append(self._left[:count])
        self._left = self._left[count:]
        return self._taken[-1]


class _Workspace:
    """Tables and partials of one (device, stream), or of one call while a graph is being captured.

    Everything is written and read in the order of the stream. A table never changes once it is
    uploaded; the page-locked memory it came from goes back to torch's allocator, which waits for
    the copy's event before it hands it out again.
    """

    def __init__(self, device: torch.device, captured: bool) -> None:
        self.device = device
        self.lanes, self.programs = _INTERPRETED_LANES, _INTERPRETED_PROGRAMS
        if device.type != "cpu":
            self.lanes = _WARPS * 32
            self.programs = _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
        self.chunk_bytes = _CHUNK_VECS * _VEC_BYTES * self.lanes
        self._captured = captured
        self._tables: list[tuple[_Table, Tensor]] = []
        self._partials = torch.empty(0, dtype=torch.float64, device=device)

    def table(self, tensors: Sequence[Tensor]) -> tuple[_Table, Tensor]:
        """Return the table of these tensors and its rows on the device, uploaded if they are new."""
        key = _key(tensors)
        for position, entry in enumerate(self._tables):
            if entry[0].key == key:
                self._tables.insert(0, self._tables.pop(position))
                return entry
        table = _Table(key, tensors, self.chunk_bytes)
        entry = table, self._upload(table.rows)
        self._tables = [entry, *self._tables[: _TABLES - 1]]
        return entry

    def _upload(self, rows: array[int]) -> Tensor:
        source = torch.frombuffer(rows, dtype=torch.int64)
        if self.device.type == "cpu":
            return source.clone()
        if self._captured:
            pinned = _slab.take(len(rows)).copy_(source)
        else:
            _slab.provide(len(rows))
            pinned = source.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def partials(self, chunks: int) -> Tensor:
        """Return room for the partials of a norm, which the next norm of the stream overwrites."""
        if self._partials.numel() < 2 * chunks:
            self._partials = torch.empty(2 * chunks, dtype=torch.float64, device=self.device)
        return self._partials


# Shared by all instances. The lock is held while a call enqueues, not while the device works: a
# workspace cannot be filled by two threads at once, and Triton's interpreter is not for two either.
_lock = threading.Lock()
_workspaces: dict[tuple[torch.device, int], _Workspace] = {}
_slab = _Slab()


# ---------------------------------------------------------------- the backend


class CompileError(RuntimeError):
    """Triton cannot compile a kernel here. Nothing has been launched or written."""


@dataclasses.dataclass(frozen=True)
class _Launch:
    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class TritonBackend:
    """Triton kernels on CUDA and ROCm devices, and on CPU tensors in Triton's interpreter.

    Args:
        fallback: what serves instead, after one warning, once Triton has failed to compile a
            kernel: that is for the automatic choice, which leaves the interpreter alone, too.
            None raises, for callers who named this backend.
    """

    name = "triton"

    def __init__(self, fallback: Backend | None = None) -> None:
        self._fallback = fallback
        self._others = ForeachBackend()
        self._reasons: dict[str, str | None] = {}
        self._compiled: set[Any] = set()
        self._kernels: Any = None

    # ------------------------------------------------------------ verbs

    def norm(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        if not norm_type > 0.0:
            return self._others.norm(tensors, norm_type)
        norm = torch.empty((), dtype=torch.float64, device=tensors[0].device)
        p_bits = _bits(norm_type)
        order = norm_type if norm_type in (1.0, 2.0, math.inf) else 0.0
        try:
            with self._workspace(norm.device) as workspace:
                table, rows = workspace.table(tensors)
                partials = workspace.partials(table.chunks)
                launches = self._over(
                    "norm_kernel",
                    lambda dtype: (rows, partials, p_bits),
                    lambda vec: {"ORDER": order, "ROWS": _NORM_VECS, "COLS": workspace.lanes * vec},
                    workspace,
                    table,
                )
                finish = {"ORDER": order, "BLOCK": _FINISH_BLOCK}
                arguments = (partials, norm, p_bits, table.chunks)
                launches.append(_Launch(self._kernels.finish_kernel, 1, arguments, finish))
                self._enqueue(launches, workspace)
        except CompileError as error:
            return self._instead(error).norm(tensors, norm_type)
        if not table.irregular:
            return norm
        return _joined(norm, self._others.norm([tensors[i] for i in table.irregular], norm_type), norm_type)

    def scale_(self, grads: Sequence[Tensor], clip_coef: Tensor) -> None:
        try:
            with self._workspace(clip_coef.device) as workspace:
                table, rows = workspace.table(grads)
                in_list_order = table.overlap(grads)
                if not in_list_order:
                    self._change("scale_kernel", lambda dtype: (rows, clip_coef), workspace, table)
        except CompileError as error:
            self._instead(error).scale_(grads, clip_coef)
            return
        if in_list_order:
            self._others.scale_(grads, clip_coef)
            return
        torch.autograd.graph.increment_version(grads)
        if table.irregular:
            self._others.scale_([grads[i] for i in table.irregular], clip_coef)

    def clamp_(self, grads: Sequence[Tensor], min: float, max: float) -> None:
        def bounds(dtype: torch.dtype) -> tuple[Any, ...]:
            # Rounded to the dtype by torch, as in torch's own clamp.
            low, high = torch.tensor([min, max], dtype=dtype, device="cpu").tolist()
            return rows, _bits(low), _bits(high)

        try:
            with self._workspace(grads[0].device) as workspace:
                table, rows = workspace.table(grads)
                self._change("clamp_kernel", bounds, workspace, table)
        except CompileError as error:
            self._instead(error).clamp_(grads, min, max)
            return
        torch.autograd.graph.increment_version(grads)
        if table.irregular:
            self._others.clamp_([grads[i] for i in table.irregular], min, max)

    # ------------------------------------------------------------ launches

    @contextlib.contextmanager
    def _workspace(self, device: torch.device) -> Iterator[_Workspace]:
        """Lend the workspace of the device's current stream, with that device as the current one."""
        on_gpu = device.type == "cuda"
        with _lock, torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            if on_gpu and torch.cuda.is_current_stream_capturing():
                yield _Workspace(device, captured=True)
                return
            key = device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
            if key not in _workspaces:
                _workspaces[key] = _Workspace(device, captured=False)
            yield _workspaces[key]

    def _change(
        self,
        kernel: str,
        arguments: Callable[[torch.dtype], tuple[Any, ...]],
        workspace: _Workspace,
        table: _Table,
    ) -> None:
        lanes = workspace.lanes

        def shape(vec: int) -> dict[str, Any]:
            return {"ROWS": _CHANGE_VECS * lanes, "COLS": vec, "BLOCK": lanes * vec}

        self._enqueue(self._over(kernel, arguments, shape, workspace, table), workspace)

    def _over(
        self,
        kernel: str,
        arguments: Callable[[torch.dtype], tuple[Any, ...]],
        shape: Callable[[int], dict[str, Any]],
        workspace: _Workspace,
        table: _Table,
    ) -> list[_Launch]:
        """Return one launch per dtype in the table; ``shape`` is told how many elements 16 bytes hold."""
        launches = []
        for group in table.groups:
            itemsize = group.dtype.itemsize
            constants = shape(_VEC_BYTES // itemsize)
            constants["DTYPE"] = getattr(self._kernels.tl, str(group.dtype).removeprefix("torch."))
            constants["CHUNK"] = workspace.chunk_bytes // itemsize
            programs = min(group.chunks, workspace.programs)
            given = (*arguments(group.dtype), group.first, group.last)
            launches.append(_Launch(getattr(self._kernels, kernel), programs, given, constants))
        return launches

    def _enqueue(self, launches: Sequence[_Launch], workspace: _Workspace) -> None:
        """Compile whatever is new, then launch: a failure to compile finds everything untouched."""
        for launch in launches if workspace.device.type != "cpu" else ():
            dtypes = [a.dtype for a in launch.arguments if isinstance(a, Tensor)]
            key = (workspace.device, id(launch.kernel), *launch.constants.values(), *dtypes)
            if key not in self._compiled:
                self._compile(launch)
                self._compiled.add(key)
        for launch in launches:
            launch.kernel[(launch.programs,)](*launch.arguments, **launch.constants, num_warps=_WARPS)

    def _compile(self, launch: _Launch) -> None:
        try:
            launch.kernel.warmup(*launch.arguments, **launch.constants, num_warps=_WARPS, grid=(1,))
        except Exception as error:
            name = launch.kernel.fn.__name__
            raise CompileError(f"Triton failed to compile {name}: {type(error).__name__}: {error}") from error

    def _instead(self, error: CompileError) -> Backend:
        """Return the fallback, after a warning; raise the error if there is none."""
        if self._fallback is None:
            raise error
        if self._reasons.get("cuda") is None:  # another thread may have been here
            self._reasons["cuda"] = str(error)
            warnings.warn(f"{error}\nbackend {self._fallback.name!r} serves from now on", stacklevel=5)
        return self._fallback

    # ------------------------------------------------------------ where it runs

    def unusable(self, device_type: str) -> str | None:
        if device_type not in self._reasons:
            self._reasons[device_type] = self._why_not(device_type)
        return self._reasons[device_type]

    def _why_not(self, device_type: str) -> str | None:
        if device_type not in ("cuda", "cpu"):
            return f"its kernels have been written for CUDA and ROCm devices, not for {device_type}"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install triton"
        if device_type == "cpu":
            if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
                return "Triton compiles for GPUs only; TRITON_INTERPRET=1 interprets its kernels, for tests"
            if self._fallback is not None:
                return "Triton's interpreter is slow: it has to be asked for by name"
        elif not torch.cuda.is_available():
            return "torch finds no CUDA or ROCm device"
        try:
            return self._load(device_type)
        except Exception as error:
            return f"Triton cannot be used here: {type(error).__name__}: {error}"

    def _load(self, device_type: str) -> str | None:
        """Import Triton and the kernels; return why they do not fit the device, or None."""
        triton = importlib.import_module("triton")
        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST_TRITON:
            oldest = ".".join(map(str, _OLDEST_TRITON))
            return f"Triton {triton.__version__} is too old: {oldest} or later is needed"
        self._kernels = importlib.import_module("gradclip_ext.backends.triton_kernels")
        interpreted = not isinstance(self._kernels.norm_kernel, triton.JITFunction)
        if device_type == "cuda":
            if interpreted:
                return "TRITON_INTERPRET is set, and the interpreter cannot read GPU memory"
            devices = range(torch.cuda.device_count())
            capability = min(torch.cuda.get_device_capability(d) for d in devices)
            if torch.version.hip is None and capability < _OLDEST_CAPABILITY:
                return f"Triton needs compute capability 7.0, a device has {capability[0]}.{capability[1]}"
            return None
        if not interpreted:
            return "TRITON_INTERPRET was set after Triton had been imported"
        self.norm([torch.ones(1)], 2.0)  # interpreters have failed for a NumPy that is too new
        return None


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
