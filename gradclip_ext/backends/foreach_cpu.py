"""Norms by torch operations where the host sees every value: on the CPU, outside of torch.compile.

The list is cut into pieces that suit the cache, and a sum that left the range is computed again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from gradclip_ext.backends.base import flat_view

# Elements of one row of a float32 reduction. torch keeps 8 running sums a row, so 64 roundings
# follow one another: at worst 64/2 * 2^-24 of a sum of squares, half of that (9.5e-7) of a norm.
# Tensors of one constant come closest, with 5e-7. Rows are then added in float64.
_ROW = 512
# Elements converted to another dtype at a time: 4 MiB of float32 stay in cache.
_PIECE = 1 << 20


# Elements reduced without a copy at a time: 128 KiB of row norms.
_SPAN = 1 << 24
# Up to this many elements, joining a tensor to its neighbours costs less than a call of its own.
SMALL = 1 << 14
# Up to this many elements, one reduction in float64 costs less than rows in float32.
_FEW = 1 << 12
# A mean |x|^p below these may have lost terms to underflow: what float32 drops of one square is
# at most 2^-126 = 1.2e-38, a share of 1.2e-7 of such a mean. Likewise 2^-1022 for float64.
_LEAST_MEAN_FLOAT32 = 1e-31
_LEAST_MEAN_FLOAT64 = 1e-300
_WIDE = (torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128)


def joint_norm(tensors: Sequence[Tensor], p: float, small: int) -> Tensor:
    """Return the norm of all elements as one vector, a 0-d float64 tensor.

    Args:
        tensors: tensors of any kind in CPU memory, of which one has an element.
        p: the order of the norm, any number.
        small: the number of elements up to which a tensor is joined to its neighbours.
    """
    if p == 0.0:
        return _scalar(float(sum(_has_nonzero(t) for t in tensors)))
    if math.isinf(p):
        return _extreme(tensors, p, small)
    if math.isnan(p):
        return _scalar(math.nan)
    total = _sum_of_squares(tensors, small) if p == 2.0 else _sum_of_powers(tensors, p, small)
    mean = total / sum(t.numel() for t in tensors)
    least = _LEAST_MEAN_FLOAT32 if p in (1.0, 2.0) else _LEAST_MEAN_FLOAT64
    if not least <= mean < math.inf:
        return _rescaled_norm(tensors, p, small)
    return _scalar(math.sqrt(total)) if p == 2.0 else _scalar(total).pow(1.0 / p)


def _scalar(number: float) -> Tensor:
    return torch.scalar_tensor(number, dtype=torch.float64, device="cpu")


def _has_nonzero(tensor: Tensor) -> bool:
    # In pieces, because any() makes a mask of what it is asked about.
    return any(bool(piece.any()) for piece in _pieces([tensor], _PIECE, 0))


def _rescaled_norm(tensors: Sequence[Tensor], p: float, small: int) -> Tensor:
    """Return the norm of values whose powers leave the range, dividing by the dominant one first."""
    pivot = _extreme(tensors, math.copysign(math.inf, p), small)
    if pivot == 0.0 or not torch.isfinite(pivot):
        return pivot
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for piece in _pieces(tensors, _PIECE, small):
        total += piece.to(torch.float64, copy=True).abs_().div_(pivot).pow_(p).sum()
    return pivot * total.pow(1.0 / p)


def _sum_of_squares(tensors: Sequence[Tensor], small: int) -> float:
    total, of_rows = 0.0, {}
    for piece in _pieces(tensors, _SPAN, small, widened=True):
        if piece.numel() <= _FEW:
            norm: float = torch.linalg.vector_norm(piece, dtype=torch.float64).item()
            total += norm * norm
            continue
        if piece.dtype not in of_rows:
            of_rows[piece.dtype] = _Rows(piece.dtype)
        of_rows[piece.dtype].add(piece)
    return total + sum(rows.sum_of_squares() for rows in of_rows.values())


class _Rows:
    """Norms of rows of one dtype, of which those of many pieces are squared and added together.

    They are written to memory that was there before: a small tensor allocated beside a large temporary
    one would hold the heap open and let it grow with every piece.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._norms = torch.empty(_SPAN // _ROW + 1, dtype=dtype, device="cpu")
        self._used = 0
        self._total = 0.0

    def add(self, piece: Tensor) -> None:
        rows, rest = divmod(piece.numel(), _ROW)
        if self._used + rows + 1 > self._norms.numel():
            self._total, self._used = self.sum_of_squares(), 0
        end = self._used + rows
        body = piece.narrow(0, 0, rows * _ROW) if rest else piece
        torch.linalg.vector_norm(body.view(-1, _ROW), 2.0, 1, out=self._norms[self._used : end])
        if rest:
            torch.linalg.vector_norm(piece.narrow(0, rows * _ROW, rest), out=self._norms[end])
            end += 1
        self._used = end

    def sum_of_squares(self) -> float:
        norms = self._norms[: self._used].double()
        return self._total + torch.dot(norms, norms).item()


def _sum_of_powers(tensors: Sequence[Tensor], p: float, small: int) -> float:
    total = 0.0
    if p == 1.0:
        for span in _pieces(tensors, _SPAN, small, widened=True):
            for piece in span.split(_PIECE):
                magnitudes = piece.abs()
                body = magnitudes.numel() // _ROW * _ROW
                sums = [magnitudes[:body].view(-1, _ROW).sum(dim=1), magnitudes[body:].view(1, -1).sum(dim=1)]
                total += torch.cat(sums).double().sum().item()
        return total
    # Powers in float64: torch's float32 power is slower, and 1/p magnifies its error for small p.
    for piece in _pieces(tensors, _PIECE, small):
        total += piece.to(torch.float64, copy=True).abs_().pow_(p).sum().item()
    return total


def _extreme(tensors: Sequence[Tensor], p: float, small: int) -> Tensor:
    """Return max |x| for p = inf or min |x| for p = -inf as float64; NaN if there is one."""
    found = []
    for piece in _pieces(tensors, _SPAN if p > 0 else _PIECE, small):
        if p > 0:
            low, high = torch.aminmax(piece)
            found.append(torch.maximum(low.abs(), high.abs()).item())
        else:
            found.append(piece.abs().amin().item())
    values = torch.tensor(found, dtype=torch.float64, device="cpu")
    return values.amax() if p > 0 else values.amin()


# ---------------------------------------------------------------- pieces


def _pieces(tensors: Sequence[Tensor], most: int, small: int, widened: bool = False) -> Iterator[Tensor]:
    """Yield every element once, as real flat tensors of at most ``most`` elements.

    Dense tensors are yielded as views in memory order; tensors of up to ``small`` elements
    are joined by copying; complex ones become magnitudes, those with gaps are copied.
    If ``widened``, pieces are float32 or float64, and one may be overwritten when the next is asked for.
    """
    together: dict[torch.dtype, list[Tensor]] = {}
    narrow = []
    for tensor in tensors:
        dtype, numel = tensor.dtype, tensor.numel()
        if numel == 0:
            continue
        if numel <= small and not dtype.is_complex:
            together.setdefault(dtype, []).append(tensor)
        elif widened and dtype not in _WIDE:
            narrow.append(tensor)
        else:
            yield from _views_or_copies(tensor, most)
    for dtype, group in together.items():
        for piece in _joined(group):
            yield piece.float() if widened and dtype not in _WIDE else piece
    if narrow:
        yield from _converted(narrow)


def _joined(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yield small tensors of one dtype as few flat copies, each of at most _PIECE elements."""
    start = size = 0
    for index, tensor in enumerate(tensors):
        size += tensor.numel()
        if size > _PIECE:
            yield _concatenated(tensors[start:index])
            start, size = index, tensor.numel()
    if tensors:
        yield _concatenated(tensors[start:])


def _concatenated(tensors: list[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].reshape(-1).contiguous()
    # Biases and norms are 1-d, and cat takes those as they are for a third of the time.
    if all(t.dim() == 1 for t in tensors):
        return torch.cat(tensors)
    joined: Tensor = _flatten_dense_tensors(tensors)
    return joined


def _converted(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yield tensors in float32, many in one piece: a call for each would cost more than its elements."""
    memory = _floats(min(_PIECE, sum(t.numel() for t in tensors)))
    together: list[Tensor] = []
    size = 0
    for tensor in tensors:
        for piece in _views_or_copies(tensor, _PIECE):
            if size + piece.numel() > memory.numel():
                yield _filled(memory[:size], together)
                together, size = [], 0
            together.append(piece)
            size += piece.numel()
    if together:
        yield _filled(memory[:size], together)


_of_thread = threading.local()


def _floats(numel: int) -> Tensor:
    """Return at least so much memory, which the thread keeps: the system takes 3 ms to give 8 MiB anew."""
    kept: Tensor | None = getattr(_of_thread, "floats", None)
    if kept is None or kept.numel() < numel:
        with torch.inference_mode(False):  # what is made there could only be written to there
            kept = _of_thread.floats = torch.empty(numel, dtype=torch.float32, device="cpu")
    return kept


def _filled(memory: Tensor, pieces: list[Tensor]) -> Tensor:
    torch._foreach_copy_(list(memory.split([piece.numel() for piece in pieces])), pieces)
    return memory


def _views_or_copies(tensor: Tensor, most: int) -> Iterable[Tensor]:
    """Return the elements of a tensor, at most ``most`` at a time."""
    flat = None if tensor.is_complex() else flat_view(tensor)
    if flat is None:
        return _copied_pieces(tensor)
    return (flat,) if flat.numel() <= most else flat.split(most)  # split() takes five microseconds


def _copied_pieces(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.numel() > _PIECE:
        longest = max(range(tensor.dim()), key=tensor.size)
        for half in tensor.tensor_split(2, dim=longest):
            yield from _copied_pieces(half)
    elif tensor.is_complex():
        # complex128 first: |z| of a complex64 can exceed the largest float32.
        yield tensor.to(torch.complex128).abs().reshape(-1)
    else:
        # A 1-d tensor with gaps is flat as it is, and torch sums such rows with fewer running sums.
        yield tensor.reshape(-1).contiguous()
