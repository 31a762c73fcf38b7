"""Lists of tensors as the kernels of the triton backend find them: what identifies a list, and its table."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gradclip_ext import _core
from gradclip_ext.backends.foreach import _flat_view, _share_memory

CHUNK_BYTES = 65536
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # by DType of csrc/grad_list.h


class Columns(NamedTuple):
    """Where tensors are, how many elements they have, of which dtype."""

    pointers: Sequence[int]
    numels: Sequence[int]
    dtypes: Sequence[torch.dtype]


class Listing(Protocol):
    """A list of tensors of one device, read once for one call.

    ``dtypes`` are those of all tensors, empty ones among them. ``key`` is all that a table depends on;
    a hash of it would not do, because through a stale address kernels would write.
    """

    device: torch.device
    dtypes: set[torch.dtype]
    key: Any

    def columns(self) -> Columns:
        """Return what the tensors are, column by column."""

    def irregular(self) -> list[int]:
        """Return the places of what a table cannot hold: complex tensors and those with gaps in memory."""

    def overlap(self, spans: list[tuple[int, int]]) -> bool:
        """Tell whether two tensors share memory, given where those lie that a table can hold."""

    def bump_versions(self) -> None:
        """Bump the version counters, as torch's in-place operations do."""


def norm_dtype(listing: Listing) -> torch.dtype:
    """Return the dtype of a norm that users get."""
    narrow = listing.dtypes.isdisjoint((torch.float64, torch.complex128))
    return torch.float32 if narrow else torch.float64


class TensorList:
    """Any checked tensors, read in Python at 0.2 us each."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self.device = tensors[0].device
        self._columns = Columns(
            list(map(Tensor.data_ptr, tensors)),
            list(map(Tensor.numel, tensors)),
            [t.dtype for t in tensors],
        )
        self.dtypes = set(self._columns.dtypes)
        dense = all(map(Tensor.is_contiguous, tensors))
        self._strided = [] if dense else [i for i, t in enumerate(tensors) if not t.is_contiguous()]
        self.key = self._columns, [(i, tensors[i].shape, tensors[i].stride()) for i in self._strided]

    def columns(self) -> Columns:
        return self._columns

    def irregular(self) -> list[int]:
        places = {i for i in self._strided if _flat_view(self._tensors[i]) is None}
        return sorted(places.union(i for i, t in enumerate(self._tensors) if t.dtype.is_complex))

    def overlap(self, spans: list[tuple[int, int]]) -> bool:
        spans = sorted(spans)
        dense = any(start < end for (_, end), (start, _) in pairwise(spans))
        return dense or (bool(self.irregular()) and _share_memory(self._tensors))

    def bump_versions(self) -> None:
        torch.autograd.graph.increment_version(self._tensors)


class GatheredList:
    """Gradients that the compiled module has read and checked: dense, none of them sharing memory."""

    def __init__(self, gathered: _core.Gathered) -> None:
        self.device = gathered.device
        self.key = gathered.columns()
        self.dtypes = {_DTYPES[number] for number in gathered.dtypes()}
        self.bump_versions = gathered.bump_versions

    def columns(self) -> Columns:
        integers = 16 * (len(self.key) // 17)  # two columns of 8 bytes, one of 1
        pointers_and_numels = array("q", self.key[:integers])
        middle = len(pointers_and_numels) // 2
        dtypes = [_DTYPES[number] for number in self.key[integers:]]
        return Columns(pointers_and_numels[:middle], pointers_and_numels[middle:], dtypes)

    def irregular(self) -> list[int]:
        return []

    def overlap(self, spans: list[tuple[int, int]]) -> bool:
        return False


class Group(NamedTuple):
    """The tensors [first, last) of a table, which are of one dtype, and their number of chunks."""

    dtype: torch.dtype
    first: int
    last: int
    chunks: int


class Table:
    """What the kernels have to know of a list of tensors, none of which is kept.

    ``rows``, and its copy ``on_device``, is what triton_kernels.py calls a table; ``irregular`` are
    the places in the list of what it cannot hold. ``launches`` is for the backend to keep what it
    launches on this table.
    """

    on_device: Tensor

    def __init__(self, listing: Listing) -> None:
        columns = listing.columns()
        self.irregular = listing.irregular()
        self.groups: list[Group] = []
        self.rows = array("q")
        self.chunks = 0
        self.launches: dict[tuple[Any, ...], list[Any]] = {}
        self._spans: list[tuple[int, int]] = []
        self._overlap: bool | None = None
        left_out = set(self.irregular)
        for dtype in dict.fromkeys(columns.dtypes):
            chunk = CHUNK_BYTES // dtype.itemsize
            first, before = len(self.rows) // 3, self.chunks
            for index, (pointer, numel, own) in enumerate(zip(*columns)):
                if own is dtype and numel > 0 and index not in left_out:
                    self.rows.extend((pointer, numel, self.chunks))
                    self.chunks += -(-numel // chunk)
                    self._spans.append((pointer, pointer + numel * dtype.itemsize))
            if self.chunks > before:
                self.groups.append(Group(dtype, first, len(self.rows) // 3, self.chunks - before))
        self.rows.extend((0, 0, self.chunks))

    def overlap(self, listing: Listing) -> bool:
        """Tell whether two tensors of its list share memory, so that the order of writing matters."""
        if self._overlap is None:
            self._overlap = listing.overlap(self._spans)
        return self._overlap
