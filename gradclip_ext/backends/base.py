"""What a backend is, and the lists of tensors that it works on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence, Set
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from gradclip_ext import _extension
from gradclip_ext.norms import AdaptiveRule, Coefficient, Rule

# The dtypes that kernels know, in the order of DType in csrc/core/tensor_list.h.
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CODES = {dtype: code for code, dtype in enumerate(KERNEL_DTYPES)}
# What the compiled module tells as bits: bit d for KERNEL_DTYPES[d].
_DTYPES_OF_BITS = tuple(
    frozenset(dtype for dtype, code in _CODES.items() if bits >> code & 1)
    for bits in range(1 << len(KERNEL_DTYPES))
)


class TensorList:
    """Tensors of one device, in order.

    Those for a backend with kernels are all *regular* (see :func:`is_regular`) and share no memory if they
    will be written to. ``foreach`` takes any.

    Args:
        tensors: the tensors, at least one.
        native: the same list as the compiled module has read it, if it has.
    """

    def __init__(self, tensors: Sequence[Tensor], native: Any = None) -> None:
        self.tensors = tensors
        self._native = native
        self._columns: bytes | None = None
        #: What a backend keeps from the norm to the scaling of one call.
        self.prepared: Any = None
        if native is None:
            self.device: torch.device = tensors[0].device
            # No frozenset: where torch.compile of 2.6 breaks a graph, it cannot keep one.
            self.dtypes: Set[torch.dtype] = {t.dtype for t in tensors}
        else:
            self.device = torch.device("cuda", native.device_index) if native.is_cuda else _CPU
            self.dtypes = _DTYPES_OF_BITS[native.dtypes]

    def has_elements(self) -> bool:
        """Tell whether some tensor is not empty."""
        if self._native is not None:
            return bool(self._native.has_elements)
        return any(t.numel() > 0 for t in self.tensors)

    def native(self) -> Any:
        """Return the list as the compiled module takes it."""
        if self._native is None:
            assert _extension.C is not None
            dtypes = sum(1 << _CODES[dtype] for dtype in self.dtypes)
            is_cuda, index = self.device.type == "cuda", self.device.index or 0
            empty = [i for i, t in enumerate(self.tensors) if t.numel() == 0]
            self._native = _extension.C.from_columns(
                list(self.tensors), self.columns(), empty, dtypes, is_cuda, index
            )
        return self._native

    def columns(self) -> bytes:
        """Return three columns, without the empty tensors: addresses and numbers of elements as int64,
        codes of dtypes as bytes. Equal columns mean the same memory."""
        if self._columns is None:
            self._columns = self._read_columns() if self._native is None else self._native.columns
        return self._columns

    def _read_columns(self) -> bytes:
        tensors = [t for t in self.tensors if t.numel() > 0]
        addresses = array("q", map(Tensor.data_ptr, tensors))
        numels = array("q", map(Tensor.numel, tensors))
        return addresses.tobytes() + numels.tobytes() + bytes(_CODES[t.dtype] for t in tensors)


_CPU = torch.device("cpu")


class Backend(Protocol):
    """The operations on a tensor list. None of them waits for an accelerator."""

    name: str

    def why_unavailable(self, device: torch.device) -> str | None:
        """Return why this backend cannot handle tensors on a device, or None if it can."""

    def norm(
        self, tensors: TensorList, norm_type: float, rule: Rule, dtype: torch.dtype
    ) -> tuple[Tensor, Coefficient]:
        """Return the norm of all elements as one vector, and the coefficient that the rule makes of it.

        The norm is a new 0-d tensor of this dtype (float32 or float64) on the device of the tensors, of
        which one has an element. The rule has a number or a tensor as max_norm. The orders <= 0 are for
        ``foreach`` alone.
        """

    def scale_(self, tensors: TensorList, clip_coef: Coefficient, may_zero: bool = False) -> None:
        """Multiply by the coefficient, in float32 arithmetic or wider; write nothing where it is 1 or more.

        The coefficient is a number or, on the device of the tensors, a 0-d tensor or a vector with one for
        each tensor. If ``may_zero``, it may be ZERO, for +0.0 in place of every element.
        """

    def clip_each_(self, tensors: TensorList, norm_type: float, rule: Rule, dtype: torch.dtype) -> Tensor:
        """Scale each tensor by the rule's coefficient for its own norm, and return those norms.

        The norms, as long a vector as the list, are of this dtype (float32 or float64) on the device of the
        tensors, with 0 for those without elements. The rule has a number as max_norm or, there, a tensor with
        one element or one for each tensor. The orders <= 0 are for ``foreach`` alone.
        """

    def statistics(self, tensors: TensorList, norm_type: float) -> Tensor:
        """Return the norm of all elements, and four rows with a column for each tensor: its norm, its largest
        magnitude (NaN if one is), how many elements are 0 and how many NaN or infinite.

        A new vector of 1 + 4 n elements on the device of the tensors, in float64 (float32 where a device has
        nothing wider). The norms are 0 without elements. The orders <= 0 are for ``foreach`` alone.
        """

    def clip_adaptive_(self, grads: TensorList, weights: TensorList, rule: AdaptiveRule) -> None:
        """Scale each unit of each gradient by the rule's coefficient for its norm and its weight's.

        Each weight has the shape of its gradient. For a backend with kernels, both are regular, and units
        are contiguous in both (see :func:`has_flat_units`).
        """

    def clamp_(self, tensors: TensorList, min: float, max: float) -> None:
        """Clamp to [min, max]; NaN stays NaN."""


# ---------------------------------------------------------------- memory


def are_contiguous(tensors: Sequence[Tensor]) -> bool:
    """Tell whether all are regular and even contiguous, at half the time that :func:`is_regular` takes."""
    return (
        {t.dtype for t in tensors} <= _CODES.keys()
        and all(t.layout is torch.strided for t in tensors)
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and all(map(Tensor.data_ptr, tensors))
    )


def is_regular(tensor: Tensor) -> bool:
    """Tell whether kernels take a plain tensor: of a kernel dtype, strided, without gaps or lazy bits."""
    return (
        tensor.dtype in _CODES
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and (tensor.numel() == 0 or tensor.data_ptr() != 0)
        and flat_view(tensor) is not None
    )


def flat_view(tensor: Tensor) -> Tensor | None:
    """Return a 1-d view of a dense tensor in memory order, or None if it has gaps."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return tensor.view(-1) if tensor.is_contiguous() else None


def units_of(tensor: Tensor) -> int:
    """Return the number of units of adaptive clipping: slices along dimension 0, or 1 below 2 dimensions."""
    return tensor.shape[0] if tensor.dim() > 1 else 1


def has_flat_units(tensor: Tensor) -> bool:
    """Tell whether the units of a regular tensor are contiguous: dimension 0 is the outermost in memory."""
    units = units_of(tensor)
    return units <= 1 or tensor.numel() == 0 or tensor.stride(0) * units == tensor.numel()


def current_stream_handle(device: torch.device) -> int:
    """Return the handle of a GPU's current stream, 0 for its default stream."""
    # What torch gives to code that it generates, in a tenth of the time that a Stream object takes.
    return torch._C._cuda_getCurrentRawStream(device.index)


# (device index, handle) of the streams that torch has created and never destroys.
_pool_streams: set[tuple[int, int]] = set()


def current_stream(device: torch.device) -> tuple[int, bool]:
    """Return the handle of a GPU's current stream, and whether that stream lives as long as the process.

    A handle is no name of a stream that may be destroyed: a new stream may get it while kernels of the old
    one still run.
    """
    handle = current_stream_handle(device)
    key = device.index, handle
    if handle == 0 or key in _pool_streams:
        return handle, True
    # The id of a stream that torch has not created is its handle.
    lives_on = torch.cuda.current_stream(device).stream_id != handle
    if lives_on:
        _pool_streams.add(key)
    return handle, lives_on


def addresses_of(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the ranges of addresses [begin, end) of those tensors that have memory."""
    ranges = []
    for t in tensors:
        if t.layout is torch.strided and t.numel() > 0 and (address := t.data_ptr()) != 0:
            span = t.numel()
            if not t.is_contiguous():
                span = 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride()))
            ranges.append((address, address + span * t.element_size()))
    return ranges


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Tell whether the address ranges of two tensors overlap."""
    ranges = sorted(addresses_of(tensors))
    return any(start < end for (_, end), (start, _) in pairwise(ranges))
