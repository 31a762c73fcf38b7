"""The Triton kernels. They find the tensors through a table. Imported when the backend is first used.

A table holds three int64 per tensor: its address, its number of elements and the index of its first chunk.
One more row ends the table. A chunk is ``CHUNK`` elements of one tensor, or the rest of it, and is read in
tiles of ``ROWS * COLS`` elements. The lane that holds an element, and the order in which elements are added,
depend on sizes alone: results have the same bits at any address and for any grid. Half types are computed in
float32, float64 in float64; ``FLOAT`` is that dtype.

A partial is two float64 per chunk, ``scale`` and ``total``: the chunk's sum of |x|^p is ``total * scale^p``.
``scale`` is 1 if that sum is in range, else the chunk's largest magnitude, so that ``total`` is always in
range. For p = inf, ``scale`` is the largest magnitude and ``total`` is not used.

``ORDER`` is p if p is 1, 2 or inf. For any other p it is 0, and p is passed at run time. Numbers are passed
as the bits of a float64 in an integer, because Triton passes a Python float as float32.

Arguments that change from call to call come first. A binary depends on their dtypes and on which pointers
are None, not on values or addresses: it is looked up once and used for all such calls.
"""

# mypy: ignore-errors
# ruff: noqa: SIM300
# (inside @triton.jit, names and branches are Triton's, and so are the long lists of constants)

from __future__ import annotations

import triton
import triton.language as tl

INF: tl.constexpr = tl.constexpr(float("inf"))
# A float32 sum of squares below this may have lost terms: a square below 2^-126 is subnormal, which loses
# bits, or 0. In float64 the same holds below 2^-1022.
MIN_SUM_FLOAT32: tl.constexpr = tl.constexpr(1e-30)
MIN_SUM_FLOAT64: tl.constexpr = tl.constexpr(1e-290)


# ---------------------------------------------------------------- where the work is


@triton.jit
def _chunk_range(table_ptr, first, last):
    """Return the chunks [begin, end) of this program, a contiguous part of those of tensors [first, last)."""
    offset = tl.load(table_ptr + 3 * first + 2)
    chunks = tl.load(table_ptr + 3 * last + 2) - offset
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    return offset + chunks * program // programs, offset + chunks * (program + 1) // programs


@triton.jit
def _tensor_of(table_ptr, chunk, first, last):
    """Return the tensor among [first, last) that holds a chunk, found by binary search."""
    low = first
    high = last
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table_ptr + 3 * middle + 2) <= chunk:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _chunk(table_ptr, tensor, chunk, CHUNK: tl.constexpr, CHUNK_BYTES: tl.constexpr):
    """Return the address of a chunk of ``tensor`` and its number of elements."""
    row_ptr = table_ptr + 3 * tensor
    index = chunk - tl.load(row_ptr + 2)
    address = tl.load(row_ptr) + index * CHUNK_BYTES
    length = tl.minimum(tl.load(row_ptr + 1) - index * CHUNK, CHUNK).to(tl.int32)
    return address, length


# ---------------------------------------------------------------- elements


@triton.jit
def _vector_ptrs(address, start, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return pointers to a tile [ROWS, COLS] in aligned memory, which is accessed 16 bytes at a time."""
    # Triton does not know the alignment of an address from a table, and only uses a hint after the cast.
    x_ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    return x_ptr + start + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def _element_ptrs(address, start, length, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Return pointers to BLOCK single elements from ``start`` on, and a mask of those before ``length``."""
    offsets = start + tl.arange(0, BLOCK)
    return address.to(tl.pointer_type(DTYPE)) + offsets, offsets < length


@triton.jit
def _load_tile(address, start, length, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return elements from ``start`` on as [ROWS, COLS], with zeros from ``length`` on.

    The branch holds only the load. The same code computes on the result of either load, so that a sum has
    the same bits at any alignment.
    """
    if (address % 16 == 0) & (start + ROWS * COLS <= length):
        x = tl.load(_vector_ptrs(address, start, DTYPE, ROWS, COLS))
    else:
        offsets = start + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
        x = tl.load(address.to(tl.pointer_type(DTYPE)) + offsets, mask=offsets < length, other=0.0)
    return x


# ---------------------------------------------------------------- norm


@triton.jit
def _float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _power(x, p, ORDER: tl.constexpr):
    """Return x^p for float64 x >= 0."""
    if ORDER == 2.0:
        result = x * x
    elif ORDER == 1.0:
        result = x
    else:
        result = tl.exp2(tl.log2(x) * p)
    return result


@triton.jit
def _max_magnitude(address, length, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the largest magnitude of a chunk as float64, NaN if an element is NaN.

    tl.max ignores NaN, so the bits of the magnitudes are compared as integers: then NaN is above inf.
    """
    FLOAT: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    INT: tl.constexpr = tl.int64 if DTYPE == tl.float64 else tl.int32
    largest = tl.zeros((COLS,), INT)
    for start in range(0, length, ROWS * COLS):
        x = _load_tile(address, start, length, DTYPE, ROWS, COLS).to(FLOAT)
        largest = tl.maximum(largest, tl.max(tl.abs(x).to(INT, bitcast=True), axis=0))
    return tl.max(largest, axis=0).to(FLOAT, bitcast=True).to(tl.float64)


@triton.jit
def _sum(address, length, ORDER: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the sum of |x|^ORDER of a chunk, for ORDER 1 or 2, as float64.

    A sum that may be wrong is below MIN_SUM, infinite or NaN. ROWS = 8 terms are added in FLOAT, and those
    sums in float64. In float32, 8 roundings of a sum of squares and one of each square are at most
    9/2 * 2^-24 = 2.7e-7 of a norm. On GPUs with few float64 units, converting every element would take
    longer than reading it.
    """
    FLOAT: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    total = tl.zeros((COLS,), tl.float64)
    for start in range(0, length, ROWS * COLS):
        x = _load_tile(address, start, length, DTYPE, ROWS, COLS).to(FLOAT)
        total += tl.sum(x * x if ORDER == 2.0 else tl.abs(x), axis=0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _scaled_sum(address, length, scale, p, ORDER: tl.constexpr, DTYPE: tl.constexpr, COLS: tl.constexpr):
    """Return the sum of (|x| / scale)^p of a chunk in float64, one row at a time to save registers."""
    FLOAT: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    total = tl.zeros((COLS,), tl.float64)
    for start in range(0, length, COLS):
        x = _load_tile(address, start, length, DTYPE, 1, COLS).to(FLOAT).to(tl.float64)
        total += tl.sum(_power(tl.abs(x) / scale, p, ORDER), axis=0)
    return tl.sum(total, axis=0)


@triton.jit
def _partial(
    address, length, p, ORDER: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return the partial of a chunk.

    A sum that overflowed or may have lost terms is computed again from L2. That includes every sum of 0:
    telling a chunk of zeros from squares that underflowed would slow down all chunks.
    """
    MIN_SUM: tl.constexpr = MIN_SUM_FLOAT64 if DTYPE == tl.float64 else MIN_SUM_FLOAT32
    scale = tl.full((), 1.0, tl.float64)
    total = tl.full((), 0.0, tl.float64)
    if ORDER == INF:
        scale = _max_magnitude(address, length, DTYPE, ROWS, COLS)
    else:
        if ORDER != 0.0:
            total = _sum(address, length, ORDER, DTYPE, ROWS, COLS)
        if not ((total >= MIN_SUM) & (total < INF)):
            scale = _max_magnitude(address, length, DTYPE, ROWS, COLS)
            total = tl.full((), 1.0, tl.float64)
            if (scale > 0.0) & (scale < INF):
                total = _scaled_sum(address, length, scale, p, ORDER, DTYPE, COLS)
    return scale, total


@triton.jit(do_not_specialize=["p_bits", "first", "last"])
def norm_kernel(
    table_ptr,
    partials_ptr,
    p_bits: tl.int64,
    first,
    last,
    DTYPE: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
):
    """Write one partial for every chunk of the tensors [first, last), which are all of one dtype."""
    p = _float64(p_bits)
    begin, end = _chunk_range(table_ptr, first, last)
    tensor = _tensor_of(table_ptr, begin, first, last)
    for chunk in range(begin, end):
        if chunk >= tl.load(table_ptr + 3 * tensor + 5):  # one step is enough: every tensor has a chunk
            tensor += 1
        address, length = _chunk(table_ptr, tensor, chunk, CHUNK, CHUNK_BYTES)
        scale, total = _partial(address, length, p, ORDER, DTYPE, ROWS, COLS)
        tl.store(partials_ptr + 2 * chunk, scale)
        tl.store(partials_ptr + 2 * chunk + 1, total)


# ---------------------------------------------------------------- scale and clamp


@triton.jit
def _whole_tiles(address, length, TILE: tl.constexpr):
    """Return how many elements of a chunk are in whole tiles that can be accessed 16 bytes at a time."""
    whole = length // TILE * TILE
    return tl.where(address % 16 == 0, whole, 0)


@triton.jit
def _load_ahead(ptrs):
    """Return a tile whose loads are all in flight before the first store: ptxas would mix them."""
    x = tl.load(ptrs)
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
    BLOCK: tl.constexpr,
):
    """Multiply a chunk by the coefficient."""
    whole = _whole_tiles(address, length, ROWS * COLS)
    for start in range(0, whole, ROWS * COLS):
        ptrs = _vector_ptrs(address, start, DTYPE, ROWS, COLS)
        tl.store(ptrs, _product(_load_ahead(ptrs), clip_coef, MAY_ZERO))
    for start in range(whole, length, BLOCK):
        ptrs, mask = _element_ptrs(address, start, length, DTYPE, BLOCK)
        tl.store(ptrs, _product(tl.load(ptrs, mask=mask), clip_coef, MAY_ZERO), mask=mask)


@triton.jit(do_not_specialize=["clip_coef_ptr", "first", "last"])
def scale_kernel(
    clip_coef_ptr,
    table_ptr,
    first,
    last,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
):
    """Multiply the tensors [first, last) by the coefficient; write nothing if it is 1 or more."""
    clip_coef = tl.load(clip_coef_ptr)
    if clip_coef >= 1.0:
        return
    begin, end = _chunk_range(table_ptr, first, last)
    tensor = _tensor_of(table_ptr, end - 1, first, last)
    # Backwards, because the chunks that norm_kernel read last are still in L2.
    for step in range(0, end - begin):
        chunk = end - 1 - step
        if chunk < tl.load(table_ptr + 3 * tensor + 2):
            tensor -= 1
        address, length = _chunk(table_ptr, tensor, chunk, CHUNK, CHUNK_BYTES)
        _scale_chunk(address, length, clip_coef, False, DTYPE, ROWS, COLS, BLOCK)


@triton.jit
def _clamped(x, low, high):
    """Return x clamped to [low, high], and a mask of the elements that change.

    The dtype of x represents both bounds exactly. Elements are compared in the dtype of the bounds but
    selected in their own, so that NaN keeps its bits.
    """
    below = x.to(low.dtype) < low
    above = x.to(low.dtype) > high
    return tl.where(below, low.to(x.dtype), tl.where(above, high.to(x.dtype), x)), below | above


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
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
):
    """Clamp the tensors [first, last) to bounds that DTYPE represents exactly; store only what changes."""
    FLOAT: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    low = _float64(min_bits).to(FLOAT)
    high = _float64(max_bits).to(FLOAT)
    begin, end = _chunk_range(table_ptr, first, last)
    tensor = _tensor_of(table_ptr, begin, first, last)
    for chunk in range(begin, end):
        if chunk >= tl.load(table_ptr + 3 * tensor + 5):
            tensor += 1
        address, length = _chunk(table_ptr, tensor, chunk, CHUNK, CHUNK_BYTES)
        whole = _whole_tiles(address, length, ROWS * COLS)
        for start in range(0, whole, ROWS * COLS):
            ptrs = _vector_ptrs(address, start, DTYPE, ROWS, COLS)
            x, changed = _clamped(_load_ahead(ptrs), low, high)
            # The mask is the same for a whole row of 16 bytes, which is stored or skipped as one.
            tl.store(ptrs, x, mask=tl.max(changed.to(tl.int32), axis=1, keep_dims=True) > 0)
        for start in range(whole, length, BLOCK):
            ptrs, mask = _element_ptrs(address, start, length, DTYPE, BLOCK)
            x, changed = _clamped(tl.load(ptrs, mask=mask), low, high)
            tl.store(ptrs, x, mask=mask & changed)
