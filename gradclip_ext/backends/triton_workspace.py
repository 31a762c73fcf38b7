"""Device memory of the triton backend: tables of tensors, partial results, and how long they live."""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradclip_ext.backends.triton_table import Listing, Table

# Programs of a launch. On the CPU they are interpreted one after the other, and there are as many
# as show whether each finds its share of the work.
_PROGRAMS_PER_SM = 8
_INTERPRETED_PROGRAMS = 3
# Lists that a workspace remembers, at 24 bytes a tensor: a GAN has two, pointers come and go.
_TABLES = 8
_SLAB_NUMEL = 1 << 17
# Captured calls that page-locked memory is kept ready for: a step makes two or three with one list.
_CAPTURED_CALLS = 8


class _Slab:
    """Page-locked memory for the tables of captured graphs.

    A graph copies its table from there at every replay and gives no notice of its end, so what was
    taken is neither reused nor freed: 24 bytes a tensor and capture. It is allocated ahead of
    time, because not every torch can do that during a capture.
    """

    def __init__(self) -> None:
        self._taken: list[Tensor] = []
        self._left = torch.empty(0, dtype=torch.int64, device="cpu")
        self._lock = threading.Lock()

    def provide(self, numel: int) -> None:
        """Make sure that so many integers can be taken."""
        if self._left.numel() >= numel:
            return
        with self._lock:
            self._provide(numel)

    def take(self, numel: int) -> Tensor:
        with self._lock:
            self._provide(numel)
            taken, self._left = self._left[:numel], self._left[numel:]
            self._taken.append(taken)
            return taken

    def _provide(self, numel: int) -> None:
        if self._left.numel() < numel:
            numel = max(2 * numel, _SLAB_NUMEL)
            with torch.inference_mode(False):  # a capture outside of it will write there
                self._left = torch.empty(numel, dtype=torch.int64, device="cpu", pin_memory=True)


class Workspace:
    """Tables and partials of one (device, stream), or of one call while a graph is being captured.

    All of it is written and read in the order of the stream. A table never changes once it is
    uploaded; the page-locked memory it came from goes back to torch's allocator, which waits for
    the copy's event before handing it out again. A workspace lives as long as the process.

    ``lock`` is held while a call enqueues, not while the device works: two threads cannot fill one
    workspace, nor run Triton's interpreter.
    """

    def __init__(self, device: torch.device, captured: bool) -> None:
        self.device = device
        self.programs = _INTERPRETED_PROGRAMS
        self.warp_size = 32
        if device.type != "cpu":
            properties = torch.cuda.get_device_properties(device)
            self.programs = _PROGRAMS_PER_SM * properties.multi_processor_count
            self.warp_size = properties.warp_size  # 64 on ROCm's data centre devices
        self.lock = threading.Lock()
        self._captured = captured
        self._tables: list[tuple[Any, Table]] = []
        self._partials = torch.empty(0, dtype=torch.float64, device=device)
        self._clip_coefs: dict[torch.dtype, Tensor] = {}

    def table(self, listing: Listing) -> Table:
        """Return the table of these tensors, uploaded if it is new."""
        found = next((i for i, (key, _) in enumerate(self._tables) if key == listing.key), None)
        if found is None:
            table = Table(listing)
            table.on_device = self._upload(table.rows)
            self._tables = [(listing.key, table), *self._tables[: _TABLES - 1]]
        else:
            self._tables.insert(0, self._tables.pop(found))
            table = self._tables[0][1]
        if self.device.type != "cpu" and not self._captured:
            _slab.provide(_CAPTURED_CALLS * len(table.rows))
        return table

    def _upload(self, rows: array[int]) -> Tensor:
        source = torch.frombuffer(rows, dtype=torch.int64)
        if self.device.type == "cpu":
            return source.clone()
        pinned = _slab.take(len(rows)).copy_(source) if self._captured else source.pin_memory()
        return pinned.to(self.device, non_blocking=True)

    def partials(self, chunks: int) -> Tensor:
        """Return room for the partials of a norm, which the next norm on the stream overwrites."""
        if self._partials.numel() < 2 * chunks:
            self._partials = torch.empty(2 * chunks, dtype=torch.float64, device=self.device)
        return self._partials

    def clip_coef(self, dtype: torch.dtype) -> Tensor:
        """Return room for a coefficient, which the next clipping on the stream overwrites."""
        if dtype not in self._clip_coefs:
            self._clip_coefs[dtype] = torch.empty((), dtype=dtype, device=self.device)
        return self._clip_coefs[dtype]


# Shared by all instances.
_workspaces: dict[tuple[torch.device, int], Workspace] = {}
_slab = _Slab()


@contextlib.contextmanager
def workspace_of(device: torch.device) -> Iterator[Workspace]:
    """Lend the workspace of the device's current stream, with the device as the current one."""
    on_gpu = device.type != "cpu"
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        if on_gpu and torch.cuda.is_current_stream_capturing():
            yield Workspace(device, captured=True)
            return
        key = device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        workspace = _workspaces.get(key) or _workspaces.setdefault(key, Workspace(device, captured=False))
        with workspace.lock:
            yield workspace
