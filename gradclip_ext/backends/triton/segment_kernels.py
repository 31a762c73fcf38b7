"""The Triton kernels with a coefficient or with statistics for each tensor.

kernels.py describes tables, partials and how arguments are passed, finalize_kernels.py the rest.
"""

# mypy: ignore-errors
# ruff: noqa: PLR0124, SIM300
# (inside @triton.jit, names and comparisons are Triton's)

from __future__ import annotations

import triton
import triton.language as tl

from gradclip_ext.backends.triton.kernels import (
    INF,
    MIN_SUM_FLOAT32,
    MIN_SUM_FLOAT64,
    _chunk,
    _chunks_backwards,
    _chunks_forwards,
    _float64,
    _load_tile,
    _next_tensor,
    _previous_tensor,
    _scaled_sum,
)
from gradclip_ext.backends.triton.update_kernels import _scale_chunk


@triton.jit(do_not_specialize=["coefs_ptr", "stride", "positions_ptr", "first", "last"])
def scale_each_kernel(
    coefs_ptr,
    stride,
    table_ptr,
    positions_ptr,
    first,
    last,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
):
    """Multiply each of the tensors [first, last) by its coefficient, or all by one for a stride of 0.

    A chunk is neither read nor written if the coefficient is 1 or more. ZERO stores +0.0.
    """
    if (stride == 0) & (tl.load(coefs_ptr) >= 1.0):
        return
    begin, end, tensor = _chunks_backwards(table_ptr, first, last)
    for step in range(0, end - begin):
        chunk = end - 1 - step
        tensor = _previous_tensor(table_ptr, tensor, chunk)
        clip_coef = tl.load(coefs_ptr + stride * tl.load(positions_ptr + tensor))
        if not (clip_coef >= 1.0):
            address, length = _chunk(table_ptr, tensor, chunk, CHUNK, CHUNK_BYTES)
            _scale_chunk(address, length, clip_coef, True, DTYPE, ROWS, COLS)


# ---------------------------------------------------------------- statistics


@triton.jit
def _scan(address, length, ORDER: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return what one read of a chunk tells: as float64 the sum of |x|^ORDER, for ORDER 1 or 2, as _sum
    computes it, and the largest magnitude, as _max_magnitude does; and how many elements are not 0."""
    FLOAT: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    INT: tl.constexpr = tl.int64 if DTYPE == tl.float64 else tl.int32
    total = tl.zeros((COLS,), tl.float64)
    largest = tl.zeros((COLS,), INT)
    nonzero = tl.zeros((COLS,), tl.int32)
    for start in range(0, length, ROWS * COLS):
        x = _load_tile(address, start, length, DTYPE, ROWS, COLS).to(FLOAT)
        if ORDER == 2.0:
            total += tl.sum(x * x, axis=0).to(tl.float64)
        elif ORDER == 1.0:
            total += tl.sum(tl.abs(x), axis=0).to(tl.float64)
        bits = tl.abs(x).to(INT, bitcast=True)
        largest = tl.maximum(largest, tl.max(bits, axis=0))
        nonzero += tl.sum((bits > 0).to(tl.int32), axis=0)
    magnitude = tl.max(largest, axis=0).to(FLOAT, bitcast=True).to(tl.float64)
    return tl.sum(total, axis=0), magnitude, tl.sum(nonzero, axis=0)


@triton.jit
def _count_nonfinite(address, length, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return how many elements of a chunk are NaN or infinite."""
    FLOAT: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    count = tl.zeros((COLS,), tl.int32)
    for start in range(0, length, ROWS * COLS):
        x = _load_tile(address, start, length, DTYPE, ROWS, COLS).to(FLOAT)
        count += tl.sum(((x != x) | (tl.abs(x) == INF)).to(tl.int32), axis=0)
    return tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["p_bits", "first", "last"])
def statistics_kernel(
    table_ptr,
    partials_ptr,
    p_bits: tl.int64,
    first,
    last,
    DTYPE: tl.constexpr,
    ORDER: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
):
    """Write for every chunk of the tensors [first, last) its partial, as norm_kernel does, its largest
    magnitude, and how many of its elements are 0 and how many NaN or infinite.

    One read for p = 1, 2 and inf. A sum out of range, other orders, and the count of non-finite elements,
    where there are any, read the chunk again from L2.
    """
    MIN_SUM: tl.constexpr = MIN_SUM_FLOAT64 if DTYPE == tl.float64 else MIN_SUM_FLOAT32
    p = _float64(p_bits)
    begin, end, tensor = _chunks_forwards(table_ptr, first, last)
    for chunk in range(begin, end):
        tensor = _next_tensor(table_ptr, tensor, chunk)
        address, length = _chunk(table_ptr, tensor, chunk, CHUNK, CHUNK_BYTES)
        total, largest, nonzero = _scan(address, length, ORDER, DTYPE, ROWS, COLS)
        scale = largest
        if ORDER != INF:
            scale = tl.full((), 1.0, tl.float64)
            if not ((total >= MIN_SUM) & (total < INF)):
                scale = largest
                total = tl.full((), 1.0, tl.float64)
                if (scale > 0.0) & (scale < INF):
                    total = _scaled_sum(address, length, scale, p, ORDER, DTYPE, COLS)
        nonfinite = tl.full((), 0, tl.int32)
        if not (largest < INF):
            nonfinite = _count_nonfinite(address, length, DTYPE, ROWS, COLS)
        row_ptr = partials_ptr + ROW * chunk
        tl.store(row_ptr, scale)
        tl.store(row_ptr + 1, total)
        tl.store(row_ptr + 2, largest)
        tl.store(row_ptr + 3, (length - nonzero).to(tl.float64))
        tl.store(row_ptr + 4, nonfinite.to(tl.float64))
