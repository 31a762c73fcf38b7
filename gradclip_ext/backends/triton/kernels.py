"""The Triton kernel for norms, and what all kernels share. Imported when the backend is first used.

The kernels find the tensors through a table. It holds three int64 per tensor: its address, its number of
elements and the index of its first chunk. One more row ends the table. A chunk is ``CHUNK`` elements of one
tensor, or the rest of it, and is read in tiles of ``ROWS * COLS`` elements. The lane that holds an element,
and the order in which elements are added, depend on sizes alone: results have the same bits at any address
and for any grid. Half types are computed in float32, float64 in float64; ``FLOAT`` is that dtype.

A partial is two float64 per chunk, ``scale`` and ``total``: the chunk's sum of |x|^p is ``total * scale^p``.
``scale`` is 1 if that sum is in range, else the chunk's largest magnitude, so that ``total`` is always in
range. For p = inf, ``scale`` is the largest magnitude and ``total`` is not used.

``ORDER`` is p if p is 1, 2 or inf. For any other p it is 0, and p is passed at run time. Numbers are passed
as the bits of a float64 in an integer, because Triton passes a Python float as float32.

Arguments that change from call to call come first. A binary depends on their dtypes and on which pointers
are None, not on values or addresses: it is looked up once and used for all such calls.
"""

# mypy: ignore-errors
# ruff: noqa: SIM102, SIM300
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
def _chunks_forwards(table_ptr, first, last):
    """Return the chunks [begin, end) of this program and the tensor that holds the first of them."""
    begin, end = _chunk_range(table_ptr, first, last)
    return begin, end, _tensor_of(table_ptr, begin, first, last)


@triton.jit
def _next_tensor(table_ptr, tensor, chunk):
    """Return the tensor that holds a chunk, where ``tensor`` holds the chunk before or this one."""
    if chunk >= tl.load(table_ptr + 3 * tensor + 5):  # one step is enough: every tensor has a chunk
        tensor += 1
    return tensor


@triton.jit
def _chunks_backwards(table_ptr, first, last):
    """Return the chunks [begin, end) of this program and the tensor that holds the last of them.

    What writes walks backwards, because the chunks that norm_kernel read last are still in L2.
    """
    begin, end = _chunk_range(table_ptr, first, last)
    return begin, end, _tensor_of(table_ptr, end - 1, first, last)


@triton.jit
def _previous_tensor(table_ptr, tensor, chunk):
    """Return the tensor that holds a chunk, where ``tensor`` holds the chunk after or this one."""
    if chunk < tl.load(table_ptr + 3 * tensor + 2):
        tensor -= 1
    return tensor


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
def _offsets(start, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the indices of a tile [ROWS, COLS] that begins at ``start``."""
    return start + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def _aligned_ptr(address, DTYPE: tl.constexpr):
    """Return a pointer to aligned memory, which is accessed 16 bytes at a time."""
    # Triton does not know the alignment of an address from a table, and only uses a hint after the cast.
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _load_tile(address, start, length, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return elements from ``start`` on as [ROWS, COLS], with zeros from ``length`` on.

    The branches hold only loads. The same code computes on the result of any of them, so that a sum has the
    same bits at any alignment.
    """
    VEC: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    whole = length // VEC * VEC
    x_ptr = _aligned_ptr(address, DTYPE)
    offsets = _offsets(start, ROWS, COLS)
    if (address % 16 == 0) & (start + ROWS * COLS <= length):
        x = tl.load(x_ptr + offsets)
    elif address % 16 == 0:
        # The last tile: whole vectors, and single elements of the one that the end cuts, which is in one row.
        # A mask of rows and one of columns take fewer registers than one of elements.
        row = (whole - start) // COLS
        cut = _offsets(start + row * COLS, 1, COLS)
        last = tl.load(x_ptr + cut, mask=(cut >= whole) & (cut < length), other=0.0)
        is_cut = (tl.arange(0, ROWS) == row)[:, None] & (cut >= whole)
        x = tl.load(x_ptr + offsets, mask=offsets < whole, other=0.0)
        x = tl.where(is_cut, last, x)
    else:
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

    A sum that may be wrong is below MIN_SUM or infinite. ROWS = 8 terms are added in FLOAT, and those
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

    A sum that overflowed or may have lost terms is computed again from L2. Some sums out of range are right:
    NaN; a 0 for ORDER 1, which adds subnormal numbers exactly; and any of float16, whose squares are normal
    float32 numbers. A 0 for ORDER 2 may be of zeros or of squares that underflowed, which the largest
    magnitude tells: such a chunk is read twice. Keeping the largest magnitude in the first read would tell,
    too, but takes 117 registers instead of 80 for bfloat16 (sm_90, Triton 3.9), and more instructions.
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
            scale = tl.abs(total)  # 0, inf or NaN is also the largest magnitude, if the sum is right
            total = tl.full((), 1.0, tl.float64)
            if ORDER == 0.0 or DTYPE != tl.float16:
                if scale > 0.0 if ORDER == 1.0 else scale >= 0.0:
                    scale = _max_magnitude(address, length, DTYPE, ROWS, COLS)
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
    begin, end, tensor = _chunks_forwards(table_ptr, first, last)
    for chunk in range(begin, end):
        tensor = _next_tensor(table_ptr, tensor, chunk)
        address, length = _chunk(table_ptr, tensor, chunk, CHUNK, CHUNK_BYTES)
        scale, total = _partial(address, length, p, ORDER, DTYPE, ROWS, COLS)
        tl.store(partials_ptr + 2 * chunk, scale)
        tl.store(partials_ptr + 2 * chunk + 1, total)
