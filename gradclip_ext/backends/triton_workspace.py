"""Device memory of the triton backend: tables of tensors, partial results, and how long they live."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gradclip_ext.backends.foreach import _flat_view, _share_memory

CHUNK_BYTES = 65536
# Programs of a launch. On the CPU they are interpreted one after the other, and there are as many
# as show whether each finds its share of the work.
_PROGRAMS_PER_SM = 8
_INTERPRETED_PROGRAMS = 3
# Lists that a workspace remembers, at 24 bytes a tensor: a GAN has two, pointers come and go.
_TABLES = 8
_SLAB_NUMEL = 1 << 17
# Captured calls that page-locked memory is kept ready for: a step makes two or three with one list.
_CAPTURED_CALLS = 8


# ---------------------------------------------------------------- tables


class _Key(NamedTuple):
    """All that a table depends on. A hash would not do: through a stale pointer kernels would write."""

    pointers: list[int]
    numels: list[int]
    dtypes: list[torch.dtype]
    strided: list[tuple[int, torch.Size, tuple[int, ...]]]  # where, shape and strides if not contiguous


def _key(tensors: Sequence[Tensor]) -> _Key:
    """0.2 us a tensor, most of what a call costs that finds its table."""
    dense = all(map(Tensor.is_contiguous, tensors))
    return _Key(
        list(map(Tensor.data_ptr, tensors)),
        list(map(Tensor.numel, tensors)),
        [t.dtype for t in tensors],
        [] if dense else [(i, t.shape, t.stride()) for i, t in enumerate(tensors) if not t.is_contiguous()],
    )


@dataclasses.dataclass(frozen=True)
class Group:
    """The tensors [first, last) of a table, which are of one dtype, and their number of chunks."""

    dtype: torch.dtype
    first: int
    last: int
    chunks: int


class Table:
    """What the kernels have to know of a list of tensors, none of which is kept.

    ``rows``, and its copy ``on_device``, is what triton_kernels.py calls a table; ``irregular`` are
    the places in the list of what it cannot hold: complex tensors and those with gaps in memory.
    ``norm_dtype`` is that of a norm that is returned to users.
    """

    on_device: Tensor

    def __init__(self, key: _Key, tensors: Sequence[Tensor]) -> None:
        irregular = {i for i, _, _ in key.strided if _flat_view(tensors[i]) is None}
        irregular.update(i for i, dtype in enumerate(key.dtypes) if dtype.is_complex)
        self.irregular = sorted(irregular)
        self.norm_dtype = torch.float64 if torch.float64 in key.dtypes else torch.float32
        self.groups: list[Group] = []
        self.rows = array("q")
        self.chunks = 0
        self._spans: list[tuple[int, int]] = []
        self._overlap: bool | None = None
        for dtype in dict.fromkeys(key.dtypes):
            chunk = CHUNK_BYTES // dtype.itemsize
            first, before = len(self.rows) // 3, self.chunks
            for index, (pointer, numel, own) in enumerate(zip(key.pointers, key.numels, key.dtypes)):
                if own is dtype and numel > 0 and index not in irregular:
                    self.rows.extend((pointer, numel, self.chunks))
                    self.chunks += -(-numel // chunk)
                    self._spans.append((pointer, pointer + numel * dtype.itemsize))
            if self.chunks > before:
                self.groups.append(Group(dtype, first, len(self.rows) // 3, self.chunks - before))
        self.rows.extend((0, 0, self.chunks))

    def overlap(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether two of the tensors share memory, so that the order of writing matters."""
        if self._overlap is None:
            spans = sorted(self._spans)
            dense = any(start < end for (_, end), (start, _) in pairwise(spans))
            self._overlap = dense or (bool(self.irregular) and _share_memory(tensors))
        return self._overlap


# ---------------------------------------------------------------- memory


class _Slab:
    """Page-locked memory for the tables of captured graphs.

    A graph copies its table from there at every replay and gives no notice of its end, so what was
    taken is neither reused nor freed: 24 bytes a tensor and capture. It is allocated ahead of
    time, because not every torch can do that during a capture.
    """

    def __init__(self) -> None:
        self._taken: list[Tensor] = []
        self._left = torch.empty(0, dtype=torch.int64, device="cpu")

    def provide(self, numel: int) -> None:
        """Make sure that so many integers can be taken."""
        if self._left.numel() < numel:
            numel = max(2 * numel, _SLAB_NUMEL)
            with torch.inference_mode(False):  # a capture outside of it will write there
                self._left = torch.empty(numel, dtype=torch.int64, device="cpu", pin_memory=True)

    def take(self, numel: int) -> Tensor:
        self.provide(numel)
        self._taken.append(self._left[:numel])
        self._left = self._left[numel:]
        return self._taken[-1]


class Workspace:
    """Tables and partials of one (device, stream), or of one call while a graph is being captured.

    All of it is written and read in the order of the stream. A table never changes once it is
    uploaded; the page-locked memory it came from goes back to torch's allocator, which waits for
    the copy's event before handing it out again. A workspace lives as long as the process.
    """

    def __init__(self, device: torch.device, captured: bool) -> None:
        self.device = device
        self.programs = _INTERPRETED_PROGRAMS
        self.warp_size = 32
        if device.type != "cpu":
            properties = torch.cuda.get_device_properties(device)
            self.programs = _PROGRAMS_PER_SM * properties.multi_processor_count
            self.warp_size = properties.warp_size  # 64 on ROCm's data centre devices
        self._captured = captured
        self._tables: list[tuple[_Key, Table]] = []
        self._partials = torch.empty(0, dtype=torch.float64, device=device)

    def table(self, tensors: Sequence[Tensor]) -> Table:
        """Return the table of these tensors, uploaded if it is new."""
        key = _key(tensors)
        for position, entry in enumerate(self._tables):
            if entry[0] == key:
                self._tables.insert(0, self._tables.pop(position))
                self._provide_for_captures(entry[1])
                return entry[1]
        table = Table(key, tensors)
        table.on_device = self._upload(table.rows)
        self._provide_for_captures(table)
        self._tables = [(key, table), *self._tables[: _TABLES - 1]]
        return table

    def _upload(self, rows: array[int]) -> Tensor:
        source = torch.frombuffer(rows, dtype=torch.int64)
        if self.device.type == "cpu":
            return source.clone()
        pinned = _slab.take(len(rows)).copy_(source) if self._captured else source.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def _provide_for_captures(self, table: Table) -> None:
        if self.device.type != "cpu" and not self._captured:
            _slab.provide(_CAPTURED_CALLS * len(table.rows))

    def partials(self, chunks: int) -> Tensor:
        """Return room for the partials of a norm, which the next norm on the stream overwrites."""
        if self._partials.numel() < 2 * chunks:
            self._partials = torch.empty(2 * chunks, dtype=torch.float64, device=self.device)
        return self._partials


# Shared by all instances. The lock is held while a call enqueues, not while the device works: two
# threads cannot fill one workspace, nor run Triton's interpreter.
_lock = threading.Lock()
_workspaces: dict[tuple[torch.device, int], Workspace] = {}
_slab = _Slab()


@contextlib.contextmanager
def workspace_of(device: torch.device) -> Iterator[Workspace]:
    """Lend the workspace of the device's current stream, with the device as the current one."""
    on_gpu = device.type != "cpu"
    with _lock, torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        if on_gpu and torch.cuda.is_current_stream_capturing():
            yield Workspace(device, captured=True)
            return
        key = device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        if key not in _workspaces:
            _workspaces[key] = Workspace(device, captured=False)
        yield _workspaces[key]
