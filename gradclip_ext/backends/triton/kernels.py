"""Triton kernels over a table of tensors. Imported when the backend is first used.

A table holds three int64 a tensor: address, number of elements, index of its first chunk; one
more row ends it. A chunk is ``CHUNK`` elements of one tensor, or what is left of it, and is read
in tiles of ``ROWS * COLS``. Which lane holds which element of a tile, and the order in which they
are added, depend on sizes alone: results have the same bits at any address and for any grid.
Half types are computed in float32, float64 in float64; ``FLOAT`` names that dtype.

A partial is two float64 a chunk, ``most`` and ``total``: the chunk's sum of |x|^p is
``total * most^p``, so that it never leaves the range. For p = inf only ``most`` counts.

``ORDER`` is p where p = 1, 2 or inf, and 0 for every other p, which comes at run time. Numbers
come as the bits of a float64 in an integer, because Triton passes a Python float as float32.

Arguments that change from call to call come first. Of those, a binary depends on dtypes and on which
pointers are None, not on values or addresses: it is found once and used for all such calls.
"""

# mypy: ignore-errors
# ruff: noqa: SIM102, SIM108, SIM300
# (inside @triton.jit, names and branches are Triton's, and so are the long lists of constants)

from __future__ import annotations

import triton
import triton.language as tl

INF: tl.constexpr = tl.constexpr(float("inf"))
# A float32 sum of squares below this may have lost terms: a square under 2^-126 keeps too few of
# its bits, or none. Likewise 2^-1022 for float64.
LEAST_FLOAT32: tl.constexpr = tl.constexpr(1e-30)
LEAST_FLOAT64: tl.constexpr = tl.constexpr(1e-290)


# ---------------------------------------------------------------- where the work is


@triton.jit
def _run(table_ptr, first, last):
    """Return the chunks [begin, end) of this program, a contiguous share of those of the tensors."""
    offset = tl.load(table_ptr + 3 * first + 2)
    chunks = tl.load(table_ptr + 3 * last + 2) - offset
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    return offset + chunks * program // programs, offset + chunks * (program + 1) // programs


@triton.jit
def _tensor_of(table_ptr, chunk, first, last):
    """Return the tensor that holds a chunk, searched for among [first, last)."""
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
def _wide_ptrs(address, start, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the pointers of a tile [ROWS, COLS] in aligned memory, to be accessed 16 bytes at a time."""
    # An address from a table has no known alignment, and a hint takes effect after the cast only.
    x_ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    return x_ptr + start + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def _narrow_ptrs(address, start, length, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the pointers of BLOCK single elements from ``start`` on, and which come before ``length``."""
    offsets = start + tl.arange(0, BLOCK)
    return address.to(tl.pointer_type(DTYPE)) + offsets, offsets < length


@triton.jit
def _load_tile(address, start, length, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return elements from ``start`` on as [ROWS, COLS], with zeros from ``length`` on.

    The branch holds nothing but the load: what is computed from it is one code for both ways, so
    that a sum has the same bits at any alignment.
    """
    if (address % 16 == 0) & (start + ROWS * COLS <= length):
        x = tl.load(_wide_ptrs(address, start, DTYPE, ROWS, COLS))
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
def _root(x, p, ORDER: tl.constexpr):
    """Return x^(1/p) for float64 x >= 0."""
    if ORDER == 2.0:
        result = tl.sqrt(x)
    elif ORDER == 1.0:
        result = x
    else:
        result = tl.exp2(tl.log2(x) / p)
    return result


@triton.jit
def _most(address, length, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the largest magnitude of a chunk as float64, NaN if there is one.

    tl.max drops NaN. Among the bits of magnitudes, read as integers, NaN comes above inf.
    """
    FLOAT: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    INT: tl.constexpr = tl.int64 if DTYPE == tl.float64 else tl.int32
    most = tl.zeros((COLS,), INT)
    for start in range(0, length, ROWS * COLS):
        x = _load_tile(address, start, length, DTYPE, ROWS, COLS).to(FLOAT)
        most = tl.maximum(most, tl.max(tl.abs(x).to(INT, bitcast=True), axis=0))
    return tl.max(most, axis=0).to(FLOAT, bitcast=True).to(tl.float64)


@triton.jit
def _sum(address, length, ORDER: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the sum of |x|^ORDER of a chunk, for 1 or 2, as float64; out of range where it may be wrong.

    FLOAT adds ROWS = 8 terms, then float64 takes over: 8 roundings of a float32 sum of squares and
    one of each square are at worst 9/2 * 2^-24 = 2.7e-7 of a norm. Converting every element would
    cost more than reading it on GPUs with little float64.
    """
    FLOAT: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    total = tl.zeros((COLS,), tl.float64)
    for start in range(0, length, ROWS * COLS):
        x = _load_tile(address, start, length, DTYPE, ROWS, COLS).to(FLOAT)
        total += tl.sum(x * x if ORDER == 2.0 else tl.abs(x), axis=0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _scaled_sum(address, length, most, p, ORDER: tl.constexpr, DTYPE: tl.constexpr, COLS: tl.constexpr):
    """Return the sum of (|x| / most)^p of a chunk in float64, a row at a time: few registers."""
    FLOAT: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    total = tl.zeros((COLS,), tl.float64)
    for start in range(0, length, COLS):
        x = _load_tile(address, start, length, DTYPE, 1, COLS).to(FLOAT).to(tl.float64)
        total += tl.sum(_power(tl.abs(x) / most, p, ORDER), axis=0)
    return tl.sum(total, axis=0)


@triton.jit
def _partial(
    address, length, p, ORDER: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return the partial of a chunk. A sum that left the range is computed again; the chunk is in L2.

    So is one of 0, though it be of zeros: to tell those from lost squares, every chunk would pay.
    """
    LEAST: tl.constexpr = LEAST_FLOAT64 if DTYPE == tl.float64 else LEAST_FLOAT32
    most = tl.full((), 1.0, tl.float64)
    total = tl.full((), 0.0, tl.float64)
    if ORDER == INF:
        most = _most(address, length, DTYPE, ROWS, COLS)
    else:
        if ORDER != 0.0:
            total = _sum(address, length, ORDER, DTYPE, ROWS, COLS)
        if not ((total >= LEAST) & (total < INF)):
            most = _most(address, length, DTYPE, ROWS, COLS)
            total = tl.full((), 1.0, tl.float64)
            if (most > 0.0) & (most < INF):
                total = _scaled_sum(address, length, most, p, ORDER, DTYPE, COLS)
    return most, total


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
    begin, end = _run(table_ptr, first, last)
    tensor = _tensor_of(table_ptr, begin, first, last)
    for chunk in range(begin, end):
        if chunk >= tl.load(table_ptr + 3 * tensor + 5):  # every tensor has a chunk: one step will do
            tensor += 1
        address, length = _chunk(table_ptr, tensor, chunk, CHUNK, CHUNK_BYTES)
        most, total = _partial(address, length, p, ORDER, DTYPE, ROWS, COLS)
        tl.store(partials_ptr + 2 * chunk, most)
        tl.store(partials_ptr + 2 * chunk + 1, total)


@triton.jit
def _coefficient(norm, max_norm):
    """Return min(1, max_norm / (norm + 1e-6)) in torch's order, reciprocal first, and rounded as there."""
    FLOAT: tl.constexpr = norm.dtype
    shifted = norm + tl.full((), 1e-6, FLOAT)
    if FLOAT == tl.float32:
        reciprocal = tl.div_rn(tl.full((), 1.0, FLOAT), shifted)  # "/" is approximate
    else:
        reciprocal = 1.0 / shifted
    clip_coef = reciprocal * max_norm.to(FLOAT)
    return tl.where(clip_coef > 1.0, tl.full((), 1.0, FLOAT), clip_coef)  # NaN stays NaN


@triton.jit(do_not_specialize=["norm_ptr", "clip_coef_ptr", "max_norm_bits", "p_bits", "chunks"])
def finish_kernel(
    norm_ptr,
    clip_coef_ptr,
    max_norm_bits: tl.int64,
    partials_ptr,
    p_bits: tl.int64,
    chunks,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the norm, and the coefficient if there is a pointer for it, each in its pointer's dtype.

    One program: the order of the sum depends on the number of partials alone.

    One pass if no chunk left the range, so that every ``most`` is 1, or 0 for a chunk of zeros; two
    otherwise. It reads 1/4096 of what norm_kernel reads, but on one SM.
    """
    p = _float64(p_bits)
    lanes = tl.arange(0, BLOCK)
    bits = tl.zeros((BLOCK,), tl.int64)
    others = tl.zeros((BLOCK,), tl.int32)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, chunks, BLOCK):
        mask = start + lanes < chunks
        most = tl.load(partials_ptr + 2 * (start + lanes), mask=mask, other=0.0)
        total = tl.load(partials_ptr + 2 * (start + lanes) + 1, mask=mask, other=0.0)
        bits = tl.maximum(bits, most.to(tl.int64, bitcast=True))
        others = tl.maximum(others, ((most != 0.0) & (most != 1.0)).to(tl.int32))
        sums += tl.where(most == 1.0, total, 0.0)
    norm = tl.max(bits, axis=0).to(tl.float64, bitcast=True)
    if ORDER != INF:
        if (norm > 0.0) & (norm < INF):
            if tl.max(others, axis=0) > 0:
                sums = tl.zeros((BLOCK,), tl.float64)
                for start in range(0, chunks, BLOCK):
                    mask = start + lanes < chunks
                    most = tl.load(partials_ptr + 2 * (start + lanes), mask=mask, other=0.0)
                    total = tl.load(partials_ptr + 2 * (start + lanes) + 1, mask=mask, other=0.0)
                    sums += total * _power(most / norm, p, ORDER)
            norm *= _root(tl.sum(sums, axis=0), p, ORDER)
    total_norm = norm.to(norm_ptr.dtype.element_ty)
    tl.store(norm_ptr, total_norm)
    if clip_coef_ptr is not None:
        tl.store(clip_coef_ptr, _coefficient(total_norm, _float64(max_norm_bits)))


# ---------------------------------------------------------------- scale and clamp


@triton.jit
def _whole_tiles(address, length, TILE: tl.constexpr):
    """Return how many elements of a chunk can be moved in whole tiles, 16 bytes at a time."""
    whole = length // TILE * TILE
    return tl.where(address % 16 == 0, whole, 0)


@triton.jit
def _load_ahead(ptrs):
    """Return a tile, all of its loads in flight together; left alone, ptxas puts stores in between."""
    x = tl.load(ptrs)
    tl.debug_barrier()
    return x


@triton.jit
def _product(x, clip_coef):
    """Return x * clip_coef, computed in float32 (float64 for float64) and rounded once."""
    FLOAT: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    return (x.to(FLOAT) * clip_coef.to(FLOAT)).to(x.dtype)


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
    begin, end = _run(table_ptr, first, last)
    tensor = _tensor_of(table_ptr, end - 1, first, last)
    # Backwards, because what norm_kernel read last is still in L2.
    for step in range(0, end - begin):
        chunk = end - 1 - step
        if chunk < tl.load(table_ptr + 3 * tensor + 2):
            tensor -= 1
        address, length = _chunk(table_ptr, tensor, chunk, CHUNK, CHUNK_BYTES)
        whole = _whole_tiles(address, length, ROWS * COLS)
        for start in range(0, whole, ROWS * COLS):
            ptrs = _wide_ptrs(address, start, DTYPE, ROWS, COLS)
            tl.store(ptrs, _product(_load_ahead(ptrs), clip_coef))
        for start in range(whole, length, BLOCK):
            ptrs, mask = _narrow_ptrs(address, start, length, DTYPE, BLOCK)
            tl.store(ptrs, _product(tl.load(ptrs, mask=mask), clip_coef), mask=mask)


@triton.jit
def _clamped(x, low, high):
    """Return x clamped to [low, high], which its dtype holds exactly, and where that changes it.

    Compared in the dtype of the bounds, chosen among values as they are: NaN keeps its bits.
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
    """Clamp the tensors [first, last) to bounds that DTYPE holds exactly; store only what changes."""
    FLOAT: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    low = _float64(min_bits).to(FLOAT)
    high = _float64(max_bits).to(FLOAT)
    begin, end = _run(table_ptr, first, last)
    tensor = _tensor_of(table_ptr, begin, first, last)
    for chunk in range(begin, end):
        if chunk >= tl.load(table_ptr + 3 * tensor + 5):
            tensor += 1
        address, length = _chunk(table_ptr, tensor, chunk, CHUNK, CHUNK_BYTES)
        whole = _whole_tiles(address, length, ROWS * COLS)
        for start in range(0, whole, ROWS * COLS):
            ptrs = _wide_ptrs(address, start, DTYPE, ROWS, COLS)
            x, changed = _clamped(_load_ahead(ptrs), low, high)
            # One mask for all of a row, which is 16 bytes: they are stored together or not at all.
            tl.store(ptrs, x, mask=tl.max(changed.to(tl.int32), axis=1, keep_dims=True) > 0)
        for start in range(whole, length, BLOCK):
            ptrs, mask = _narrow_ptrs(address, start, length, DTYPE, BLOCK)
            x, changed = _clamped(tl.load(ptrs, mask=mask), low, high)
            tl.store(ptrs, x, mask=mask & changed)
