"""The Triton kernels that write to the gradients: scale them by one coefficient, or clamp them.

kernels.py describes tables and how arguments are passed. A chunk is accessed in tiles of ``ROWS`` vectors of
16 bytes, of ``COLS`` elements each, from its first aligned address on. Only the elements before and after its
whole vectors are accessed one at a time.
"""

# mypy: ignore-errors
# ruff: noqa: SIM300
# (inside @triton.jit, names and comparisons are Triton's)

from __future__ import annotations

import triton
import triton.language as tl

from gradclip_ext.backends.triton.kernels import (
    _aligned_ptr,
    _chunk,
    _chunks_backwards,
    _chunks_forwards,
    _float64,
    _next_tensor,
    _offsets,
    _previous_tensor,
)


@triton.jit
def _aligned_vectors(address, length, VEC: tl.constexpr):
    """Return where the first aligned 16 bytes of a chunk are, and how many whole vectors begin there.

    No result depends on the lane, so that vectors need not begin where the chunk does.
    """
    head = tl.minimum((-address & 15).to(tl.int32) // (16 // VEC), length)
    return address + head * (16 // VEC), (length - head) // VEC


@triton.jit
def _edge_ptrs(address, length, DTYPE: tl.constexpr, VEC: tl.constexpr):
    """Return pointers to the elements of a chunk before and after its aligned vectors, and their mask.

    They are fewer than 2 * VEC, each in a lane of its own.
    """
    start, vectors = _aligned_vectors(address, length, VEC)
    head = ((start - address) // (16 // VEC)).to(tl.int32)
    index = tl.arange(0, 2 * VEC)
    index = tl.where(index < head, index, index + vectors * VEC)
    return address.to(tl.pointer_type(DTYPE)) + index, index < length


@triton.jit
def _load_ahead(ptrs, mask=None):
    """Return a tile whose loads are all in flight before the first store: ptxas would mix them."""
    x = tl.load(ptrs, mask=mask)
    tl.debug_barrier()
    return x


@triton.jit
def _product(x, clip_coef, MAY_ZERO: tl.constexpr):
    """Return x * clip_coef, computed in float32 (float64 for float64) and rounded once.

    If ``MAY_ZERO``, a negative coefficient is ZERO of norms.py: the result is +0.0, whatever x is.
    """
    FLOAT: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    product = x.to(FLOAT) * clip_coef.to(FLOAT)
    if MAY_ZERO:
        product = tl.where(clip_coef < 0.0, tl.full((), 0.0, FLOAT), product)
    return product.to(x.dtype)


@triton.jit
def _scale_chunk(
    address,
    length,
    clip_coef,
    MAY_ZERO: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Multiply a chunk by the coefficient."""
    start, vectors = _aligned_vectors(address, length, COLS)
    whole = vectors // ROWS * ROWS
    x_ptrs = _aligned_ptr(start, DTYPE) + _offsets(0, ROWS, COLS)
    for row in range(0, whole, ROWS):
        ptrs = x_ptrs + row * COLS
        tl.store(ptrs, _product(_load_ahead(ptrs), clip_coef, MAY_ZERO))
    edge_ptrs, is_edge = _edge_ptrs(address, length, DTYPE, COLS)
    edges = tl.load(edge_ptrs, mask=is_edge)  # in flight beside the last vectors
    if whole < vectors:
        ptrs = x_ptrs + whole * COLS
        mask = whole + tl.arange(0, ROWS)[:, None] < vectors
        tl.store(ptrs, _product(_load_ahead(ptrs, mask), clip_coef, MAY_ZERO), mask=mask)
    tl.store(edge_ptrs, _product(edges, clip_coef, MAY_ZERO), mask=is_edge)


@triton.jit(do_not_specialize=["clip_coef_ptr", "first", "last"])
def scale_kernel(
    clip_coef_ptr,
    table_ptr,
    first,
    last,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
):
    """Multiply the tensors [first, last) by the coefficient; write nothing if it is 1 or more."""
    clip_coef = tl.load(clip_coef_ptr)
    if clip_coef >= 1.0:
        return
    begin, end, tensor = _chunks_backwards(table_ptr, first, last)
    for step in range(0, end - begin):
        chunk = end - 1 - step
        tensor = _previous_tensor(table_ptr, tensor, chunk)
        address, length = _chunk(table_ptr, tensor, chunk, CHUNK, CHUNK_BYTES)
        _scale_chunk(address, length, clip_coef, False, DTYPE, ROWS, COLS)


@triton.jit
def _is_outside(x, low, high):
    """Return which elements are outside of [low, high], compared in the dtype of the bounds. No NaN is."""
    return (x.to(low.dtype) < low) | (x.to(low.dtype) > high)


@triton.jit
def _has_outside(x, low, high):
    """Return which rows of a tile, of 16 bytes each, have an element outside of [low, high].

    By the smallest and the largest one, which tl.min and tl.max find among the elements that are not NaN.
    When each element was asked, half types took an H200 as long as float32, which has twice the bytes: a
    vector took 100 instructions to clamp and store, and takes 71 now (sm_90, Triton 3.6).
    """
    x = x.to(low.dtype)
    return (tl.min(x, axis=1, keep_dims=True) < low) | (tl.max(x, axis=1, keep_dims=True) > high)


@triton.jit
def _clamped(x, low, high):
    """Return x clamped to bounds that its dtype represents exactly.

    Elements are compared in the dtype of the bounds but selected in their own, so that NaN keeps its bits.
    """
    wide = x.to(low.dtype)
    return tl.where(wide < low, low.to(x.dtype), tl.where(wide > high, high.to(x.dtype), x))


@triton.jit
def _clamp_chunk(address, length, low, high, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Clamp a chunk. Of its vectors, those with an element that changes are stored whole."""
    start, vectors = _aligned_vectors(address, length, COLS)
    whole = vectors // ROWS * ROWS
    x_ptrs = _aligned_ptr(start, DTYPE) + _offsets(0, ROWS, COLS)
    for row in range(0, whole, ROWS):
        ptrs = x_ptrs + row * COLS
        x = _load_ahead(ptrs)
        tl.store(ptrs, _clamped(x, low, high), mask=_has_outside(x, low, high))
    if whole < vectors:
        ptrs = x_ptrs + whole * COLS
        mask = whole + tl.arange(0, ROWS)[:, None] < vectors
        x = _load_ahead(ptrs, mask)
        tl.store(ptrs, _clamped(x, low, high), mask=mask & _has_outside(x, low, high))
    # Not beside the last vectors as in _scale_chunk: for half types that takes registers from all tiles.
    edge_ptrs, is_edge = _edge_ptrs(address, length, DTYPE, COLS)
    edges = tl.load(edge_ptrs, mask=is_edge)
    tl.store(edge_ptrs, _clamped(edges, low, high), mask=is_edge & _is_outside(edges, low, high))


@triton.jit(do_not_specialize=["min_bits", "max_bits", "first", "last"])
def clamp_kernel(
    min_bits: tl.int64,
    max_bits: tl.int64,
    table_ptr,
    first,
    last,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
):
    """Clamp the tensors [first, last) to bounds that DTYPE represents exactly; store only what changes."""
    FLOAT: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    low = _float64(min_bits).to(FLOAT)
    high = _float64(max_bits).to(FLOAT)
    begin, end, tensor = _chunks_forwards(table_ptr, first, last)
    for chunk in range(begin, end):
        tensor = _next_tensor(table_ptr, tensor, chunk)
        address, length = _chunk(table_ptr, tensor, chunk, CHUNK, CHUNK_BYTES)
        _clamp_chunk(address, length, low, high, DTYPE, ROWS, COLS)
