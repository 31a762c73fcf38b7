"""Norms by torch operations where the host sees every value: on the CPU, outside of torch.compile.

The list is cut into pieces that suit the cache, and a sum that left the range is computed again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gradclip_ext.backends.base import flat_view
from gradclip_ext.interception import is_intercepted

# Elements of one row of a float32 reduction. torch keeps 8 running sums a row, so 64 roundings
# follow one another: at worst 64/2 * 2^-24 of a sum of squares, half of that (9.5e-7) of a norm.
# Tensors of one constant come closest, with 5e-7. Rows are then added in float64.
_ROW = 512
# Elements copied at a time: 4 MiB of float32 stay in cache.
_PIECE = 1 << 20
# Elements of large tensors converted at a time: 8 MiB of float32, and half as many times to wait for threads.
_CONVERTED = 1 << 21
# Elements below which torch gives a thread no part of an operation.
_GRAIN = 1 << 15
# Elements reduced without a copy at a time: 128 KiB of row norms.
_SPAN = 1 << 24
# Up to this many elements, joining a tensor to its neighbours costs less than a call of its own.
SMALL = 1 << 14
# Where dtypes of two bytes are converted, tensors so many times larger are still better joined first: one
# conversion by all threads costs less than one for each, by more than the copy of two bytes an element costs.
_JOINED_IF_CONVERTED = 2
# Up to this many elements, one reduction in float64 costs less than rows in float32.
_FEW = 1 << 12
# A mean |x|^p below these may have lost terms to underflow: what float32 drops of one square is
# at most 2^-126 = 1.2e-38, a share of 1.2e-7 of such a mean. Likewise 2^-1022 for float64.
_LEAST_MEAN_FLOAT32 = 1e-31
_LEAST_MEAN_FLOAT64 = 1e-300
# Dtypes whose squares float64 holds, so that no sum of them leaves the range.
_SQUARED_IN_FLOAT64 = {torch.float32, torch.bfloat16, torch.float16}
_WIDE = {torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128}


def host_sees(tensor: Tensor) -> bool:
    """Tell whether the host may decide by the values of a tensor, without waiting for a device."""
    return tensor.device.type == "cpu" and not is_intercepted()


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


def norms(tensors: Sequence[Tensor], p: float, small: int) -> Tensor:
    """Return the norm of each tensor as :func:`joint_norm` computes it, 0 without elements, as a float64
    vector. Where it is the square root of one sum in float64, one call sums up to ``small`` elements each."""
    found = torch.zeros(len(tensors), dtype=torch.float64, device="cpu")
    together: list[int] = []
    for index, tensor in enumerate(tensors):
        numel, dtype = tensor.numel(), tensor.dtype
        if p == 2.0:
            is_quick = numel <= min(small, _FEW) and dtype in _SQUARED_IN_FLOAT64
        else:
            is_quick = p == math.inf and not dtype.is_complex
        if is_quick and numel > 0:
            together.append(index)
        elif numel > 0:
            found[index] = joint_norm([tensor], p, small)
    if not together:
        return found
    listed = [tensors[i] for i in together]
    if p == 2.0:
        found[together] = torch.stack(torch._foreach_norm(listed, p, dtype=torch.float64))
    else:
        lows, highs = zip(*map(torch.aminmax, listed))
        found[together] = torch.maximum(torch.stack(lows).abs(), torch.stack(highs).abs()).double()
    return found


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
    if len(tensors) == 1 and tensors[0].numel() <= _FEW and not tensors[0].is_complex():
        return _square_of_few(tensors[0])
    total, of_rows = 0.0, {}
    for piece in _pieces(tensors, _SPAN, small, widened=True):
        if piece.numel() <= _FEW:
            total += _square_of_few(piece)
            continue
        if piece.dtype not in of_rows:
            of_rows[piece.dtype] = _Rows(piece.dtype)
        of_rows[piece.dtype].add(piece)
    return total + sum(rows.sum_of_squares() for rows in of_rows.values())


def _square_of_few(tensor: Tensor) -> float:
    norm: float = torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
    return norm * norm


class _Rows:
    """Norms of rows of one dtype, of which those of many pieces are squared and added together."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._norms = _kept("norms", dtype, _SPAN // _ROW + 1)
        self._used = 0
        self._total = 0.0

    def add(self, piece: Tensor) -> None:
        count, rest = divmod(piece.numel(), _ROW)
        start, end = self._used, self._used + count
        if end >= self._norms.numel():
            self._total = self.sum_of_squares()
            start, end = 0, count
        norms = self._norms[start:end]
        if not piece.is_contiguous():
            rows = piece.view(piece.shape[0], -1, _ROW)
            norms = norms.view(rows.shape[:-1])
        elif rest:
            body, left = piece.view(-1).split([count * _ROW, rest])
            rows = body.view(-1, _ROW)
            torch.linalg.vector_norm(left, out=self._norms[end])
            end += 1
        else:
            rows = piece.view(-1, _ROW)
        torch.linalg.vector_norm(rows, 2.0, -1, out=norms)
        self._used = end

    def sum_of_squares(self) -> float:
        norms = self._norms[: self._used].double()
        return self._total + torch.dot(norms, norms).item()


def _sum_of_powers(tensors: Sequence[Tensor], p: float, small: int) -> float:
    total = 0.0
    if p == 1.0:
        for span in _pieces(tensors, _SPAN, small, widened=True):
            for piece in span.view(-1).split(_PIECE) if span.is_contiguous() else (span,):
                magnitudes = piece.abs().view(-1)
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
    """Yield every element once, as real tensors of at most ``most`` elements.

    Dense tensors are yielded as contiguous views; tensors of up to ``small`` elements are joined by
    copying; complex ones become magnitudes, those with gaps are copied.
    If ``widened``, pieces are float32 or float64, and one that is not contiguous is made of whole rows.
    A piece may be overwritten when the next is asked for.
    """
    together: dict[torch.dtype, list[Tensor]] = {}
    narrow = []
    small_narrow = small * _JOINED_IF_CONVERTED
    for tensor in tensors:
        dtype, numel = tensor.dtype, tensor.numel()
        if numel == 0:
            continue
        converted = widened and dtype not in _WIDE
        if numel <= (small_narrow if converted else small) and not dtype.is_complex:
            together.setdefault(dtype, []).append(tensor)
        elif converted:
            narrow.append(tensor)
        else:
            yield from _views_or_copies(tensor, most)
    if narrow:
        yield from _converted(narrow, most, together)
    for dtype, group in together.items():
        for batch, numel in portions(group, _PIECE):
            joined = _joined(batch, numel)
            converted = widened and dtype not in _WIDE
            yield _kept("floats", torch.float32, numel).copy_(joined) if converted else joined


def _converted(tensors: list[Tensor], most: int, rests: dict[torch.dtype, list[Tensor]]) -> Iterator[Tensor]:
    """Yield of tensors, as float32, what makes whole rows for every thread, and add the rest to ``rests``.

    A thread converts its part of each tensor into its part of the memory, and reduces what it converted:
    to write what another thread has read takes four times as long where the two share no cache.
    """
    threads = torch.get_num_threads()
    of_thread = min(max(_CONVERTED // threads, _GRAIN), most // threads) // _ROW * _ROW
    memory = _kept("floats", torch.float32, of_thread * threads).view(threads, of_thread)
    parts: list[Tensor] = []
    sizes: list[int] = []
    used = 0
    for tensor in tensors:
        for piece in _views_or_copies(tensor, of_thread * threads):
            numel = piece.numel()
            size = numel // threads // _ROW * _ROW
            body = piece
            if numel != size * threads:
                body, rest = piece.view(-1).split([size * threads, numel - size * threads])
                rests.setdefault(tensor.dtype, []).append(rest)
            if size == 0:
                continue
            if used + size > of_thread:
                yield _filled(memory[:, :used], parts, sizes)
                parts, sizes, used = [], [], 0
            parts.append(body.view(threads, size))
            sizes.append(size)
            used += size
    if parts:
        yield _filled(memory[:, :used], parts, sizes)


def _filled(memory: Tensor, parts: list[Tensor], sizes: list[int]) -> Tensor:
    torch._foreach_copy_(memory.split(sizes, dim=1), parts)
    return memory


def portions(tensors: list[Tensor], most: int) -> Iterator[tuple[list[Tensor], int]]:
    """Yield tensors in lists of up to so many elements, with the number of these."""
    start = total = 0
    for index, tensor in enumerate(tensors):
        numel = tensor.numel()
        if total + numel > most and total:
            yield tensors[start:index], total
            start, total = index, 0
        total += numel
    if tensors:
        yield tensors[start:], total


def _joined(tensors: list[Tensor], numel: int) -> Tensor:
    """Return the elements of tensors of one dtype as one flat tensor."""
    if len(tensors) == 1:
        return tensors[0].reshape(-1).contiguous()
    flat = [t if t.dim() == 1 else t.reshape(-1) for t in tensors]
    return torch.cat(flat, out=_kept("joined", tensors[0].dtype, numel))


_of_thread = threading.local()


def _kept(use: str, dtype: torch.dtype, numel: int) -> Tensor:
    """Return so much memory, which the thread keeps for this use and dtype.

    From the system it would come in pages that each cost a fault: more than to fill them.
    """
    kept: dict[tuple[str, torch.dtype], Tensor] = _of_thread.__dict__.setdefault("kept", {})
    memory = kept.get((use, dtype))
    if memory is None or memory.numel() < numel:
        with torch.inference_mode(False):  # what is made there could only be written to there
            memory = kept[use, dtype] = torch.empty(numel, dtype=dtype, device="cpu")
    return memory[:numel]


def _views_or_copies(tensor: Tensor, most: int) -> Iterable[Tensor]:
    """Return the elements of a tensor, at most ``most`` at a time."""
    if tensor.numel() <= most and tensor.is_contiguous() and not tensor.is_complex():
        return (tensor,)  # a view takes a microsecond
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
