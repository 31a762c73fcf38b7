"""Device memory of the triton backend: tables of tensors and partial results, and their lifetime."""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip_ext.backends.base import KERNEL_DTYPES, TensorList, current_stream

CHUNK_BYTES = 65536
# float64 numbers per chunk that fit into the memory for partials.
LONGEST_ROW = 5

# Programs of a launch. On the CPU, where they are interpreted one after the other, a few are enough to test
# that each finds its chunks.
_PROGRAMS_PER_SM = 8
_INTERPRETED_PROGRAMS = 3
# Tables that a workspace keeps, of 32 bytes per tensor: a GAN has two lists, and addresses may alternate.
_MAX_TABLES = 8
_BLOCK_NUMEL = 1 << 17
# Page-locked memory is allocated ahead for so many captured calls; a step has two or three with one list.
_CAPTURED_CALLS = 8


class Group(NamedTuple):
    """The tensors [first, last) of a table, which are of one dtype, and their number of chunks."""

    dtype: torch.dtype
    first: int
    last: int
    chunks: int


class Table:
    """The addresses and sizes of a list of tensors, as the kernels read them. Keeps no tensor alive.

    ``rows``, with its copy ``on_device``, is the table that kernels.py describes. After it come the positions
    of its tensors in the list, whose empty tensors do not count; ``positions`` is that part on the device.
    ``partials`` is memory for LONGEST_ROW numbers per chunk, which the next operation on the stream
    overwrites. In ``launches`` the backend keeps its launches on this table.
    """

    on_device: Tensor
    partials: Tensor

    def __init__(self, columns: bytes) -> None:
        addresses, numels, codes = read_columns(columns)
        self.groups: list[Group] = []
        self.rows: array[int] = array("q")
        self.chunks: int = 0
        self.launches: dict[tuple[Any, ...], list[Any]] = {}
        self.tensors: int = len(codes)
        positions = array("q")
        for code in dict.fromkeys(codes):
            dtype = KERNEL_DTYPES[code]
            chunk = CHUNK_BYTES // dtype.itemsize
            first, before = len(self.rows) // 3, self.chunks
            for position, (address, numel, dtype_code) in enumerate(zip(addresses, numels, codes)):
                if dtype_code == code:
                    positions.append(position)
                    self.rows.extend((address, numel, self.chunks))
                    self.chunks += -(-numel // chunk)
            self.groups.append(Group(dtype, first, len(self.rows) // 3, self.chunks - before))
        self.rows.extend((0, 0, self.chunks))
        self.rows.extend(positions)

    @property
    def positions(self) -> Tensor:
        return self.on_device[3 * self.tensors + 3 :]


def read_columns(columns: bytes) -> tuple[array[int], array[int], bytes]:
    """Return addresses, numbers of elements and codes of dtypes from what TensorList.columns returns."""
    integers = 16 * (len(columns) // 17)  # two columns of 8 bytes, one of 1
    both, codes = array("q", columns[:integers]), columns[integers:]
    return both[: len(codes)], both[len(codes) :], codes


class _PinnedMemory:
    """Page-locked memory for the tables of captured graphs.

    A graph copies its table from there at every replay, and nothing tells when the graph is destroyed. So
    the memory is neither reused nor freed: 32 bytes per tensor and capture. It is allocated ahead of time,
    because not every torch can allocate page-locked memory during a capture.
    """

    def __init__(self) -> None:
        self._used: list[Tensor] = []
        self._free = torch.empty(0, dtype=torch.int64, device="cpu")
        self._lock = threading.Lock()

    def reserve(self, numel: int) -> None:
        """Allocate memory unless ``numel`` integers are free."""
        if self._free.numel() >= numel:
            return
        with self._lock:
            self._reserve(numel)

    def take(self, numel: int) -> Tensor:
        """Return memory for ``numel`` integers, which is never freed."""
        with self._lock:
            self._reserve(numel)
            memory, self._free = self._free[:numel], self._free[numel:]
            self._used.append(memory)
            return memory

    def _reserve(self, numel: int) -> None:
        if self._free.numel() < numel:
            numel = max(2 * numel, _BLOCK_NUMEL)
            with torch.inference_mode(False):  # a capture outside of inference mode writes to it
                self._free = torch.empty(numel, dtype=torch.int64, device="cpu", pin_memory=True)


class Workspace:
    """Tables and partials of one (device, stream), or of one call while a graph is being captured or on a
    stream that may be destroyed.

    All of it is written and read in stream order. A table never changes after its upload. The page-locked
    memory that it was uploaded from is freed to torch's allocator, which waits for the copy's event before
    it reuses the memory. A workspace exists as long as the process.

    ``lock`` is held while a call enqueues, not while the device works: two threads must not fill one
    workspace, or run Triton's interpreter, at the same time.
    """

    def __init__(self, device: torch.device, captured: bool) -> None:
        self.device = device
        self.programs: int = _INTERPRETED_PROGRAMS
        self.warp_size: int = 32
        if device.type != "cpu":
            properties = torch.cuda.get_device_properties(device)
            self.programs = _PROGRAMS_PER_SM * properties.multi_processor_count
            self.warp_size = properties.warp_size  # 64 on ROCm's data centre devices
        self.lock: threading.Lock = threading.Lock()
        self._captured = captured
        self._tables: list[tuple[Any, Any]] = []
        self._partials = torch.empty(0, dtype=torch.float64, device=device)

    def table(self, columns: bytes) -> Table:
        """Return the table of the tensors with these columns."""

        def make() -> Table:
            table = Table(columns)
            table.partials = self._partials_for(table.chunks)
            return table

        found: Table = self.uploaded(columns, make)
        return found

    def uploaded(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return a table, made and uploaded if its key is new.

        The key is all that the table is made of, not a hash of it: with the table of another list, a kernel
        would write to memory that is not a gradient.
        """
        index = next((i for i, (known, _) in enumerate(self._tables) if known == key), None)
        if index is None:
            table = make()
            table.on_device = self._upload(table.rows)
            self._tables = [(key, table), *self._tables[: _MAX_TABLES - 1]]
        else:
            self._tables.insert(0, self._tables.pop(index))
            table = self._tables[0][1]
        if self.device.type != "cpu" and not self._captured:
            _pinned_memory.reserve(_CAPTURED_CALLS * len(table.rows))
        return table

    def _upload(self, rows: array[int]) -> Tensor:
        source = torch.frombuffer(rows, dtype=torch.int64)
        if self.device.type == "cpu":
            return source.clone()
        pinned = _pinned_memory.take(len(rows)).copy_(source) if self._captured else source.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def _partials_for(self, chunks: int) -> Tensor:
        if self._partials.numel() < LONGEST_ROW * chunks:
            self._partials = torch.empty(LONGEST_ROW * chunks, dtype=torch.float64, device=self.device)
        return self._partials


# Shared by all instances of the backend.
_workspaces: dict[tuple[torch.device, int], Workspace] = {}
_pinned_memory = _PinnedMemory()


@contextlib.contextmanager
def prepared(tensors: TensorList) -> Iterator[tuple[Workspace, Table]]:
    """Make the tensors' device current, and yield the workspace of its current stream and the table.

    The two operations of one call use the same table, so that a captured call uploads it once.
    """
    with _current(tensors.device) as on_gpu:
        if tensors.prepared is None:
            workspace = _workspace(tensors.device, on_gpu)
            with workspace.lock:
                tensors.prepared = workspace, workspace.table(tensors.columns())
        with tensors.prepared[0].lock:
            yield tensors.prepared


@contextlib.contextmanager
def locked_workspace(device: torch.device) -> Iterator[Workspace]:
    """Make a device current, and yield the workspace of its current stream for this thread alone."""
    with _current(device) as on_gpu:
        workspace = _workspace(device, on_gpu)
        with workspace.lock:
            yield workspace


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[bool]:
    """Make a device current, and yield whether it is a GPU."""
    on_gpu = device.type != "cpu"
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        yield on_gpu


def _workspace(device: torch.device, on_gpu: bool) -> Workspace:
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return Workspace(device, captured=True)
    handle, lives_on = current_stream(device) if on_gpu else (0, True)
    if not lives_on:
        return Workspace(device, captured=False)
    key = device, handle
    return _workspaces.get(key) or _workspaces.setdefault(key, Workspace(device, captured=False))
