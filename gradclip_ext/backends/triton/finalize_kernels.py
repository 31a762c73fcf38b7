"""The Triton kernels that make norms and coefficients of the partials that other kernels leave.

kernels.py describes tables, partials and how arguments are passed. A row of partials is ``ROW`` float64 per
chunk, of which ``scale`` and ``total`` come first. ``positions_ptr`` has the place of each tensor of the
table in the caller's list, because a table is ordered by dtype.
"""

# mypy: ignore-errors
# ruff: noqa: PLR0124, SIM102, SIM108, SIM300
# (inside @triton.jit, branches and comparisons are Triton's)

from __future__ import annotations

import triton
import triton.language as tl

from gradclip_ext.backends.triton.kernels import INF, _float64, _power


@triton.jit
def _pth_root(x, p, ORDER: tl.constexpr):
    """Return x^(1/p) for float64 x >= 0."""
    if ORDER == 2.0:
        result = tl.sqrt(x)
    elif ORDER == 1.0:
        result = x
    else:
        result = tl.exp2(tl.log2(x) / p)
    return result


@triton.jit
def _joint_norm(partials_ptr, begin, end, p, ORDER: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Return the norm of the chunks [begin, end) in float64.

    The order of the sum depends on the number of partials alone, so that a tensor's norm has the same bits
    beside others as alone.

    Takes one pass over the partials if ``scale`` is 1, or 0 for a chunk of zeros, in all of them; otherwise
    two.
    """
    lanes = tl.arange(0, BLOCK)
    bits = tl.zeros((BLOCK,), tl.int64)
    scaled = tl.zeros((BLOCK,), tl.int32)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        mask = start + lanes < end
        scale = tl.load(partials_ptr + ROW * (start + lanes), mask=mask, other=0.0)
        total = tl.load(partials_ptr + ROW * (start + lanes) + 1, mask=mask, other=0.0)
        bits = tl.maximum(bits, scale.to(tl.int64, bitcast=True))
        scaled = tl.maximum(scaled, ((scale != 0.0) & (scale != 1.0)).to(tl.int32))
        sums += tl.where(scale == 1.0, total, 0.0)
    norm = tl.max(bits, axis=0).to(tl.float64, bitcast=True)
    if ORDER != INF:
        if (norm > 0.0) & (norm < INF):
            if tl.max(scaled, axis=0) > 0:
                sums = tl.zeros((BLOCK,), tl.float64)
                for start in range(begin, end, BLOCK):
                    mask = start + lanes < end
                    scale = tl.load(partials_ptr + ROW * (start + lanes), mask=mask, other=0.0)
                    total = tl.load(partials_ptr + ROW * (start + lanes) + 1, mask=mask, other=0.0)
                    sums += total * _power(scale / norm, p, ORDER)
            norm *= _pth_root(tl.sum(sums, axis=0), p, ORDER)
    return norm


@triton.jit
def _coefficient(norm, max_norm, ZERO: tl.constexpr):
    """Return what Rule.clip_coef in norms.py makes of a norm and a float64 limit.

    That is min(1, max_norm / (norm + 1e-6)), with torch's operations in their order, reciprocal first.
    """
    FLOAT: tl.constexpr = norm.dtype
    one = tl.full((), 1.0, FLOAT)
    shifted = norm + tl.full((), 1e-6, FLOAT)
    if FLOAT == tl.float32:
        reciprocal = tl.div_rn(one, shifted)  # "/" is approximate
    else:
        reciprocal = one / shifted
    limit = tl.where(max_norm < 0.0, tl.full((), 0.0, tl.float64), max_norm)
    clip_coef = reciprocal * limit.to(FLOAT)
    clip_coef = tl.where((clip_coef > 1.0) | (max_norm == INF), one, clip_coef)  # NaN stays NaN
    if ZERO:
        is_finite = (tl.abs(norm) < INF) & (clip_coef == clip_coef)
        clip_coef = tl.where(is_finite, clip_coef, tl.full((), -1.0, FLOAT))
    return clip_coef


@triton.jit
def _store_norm(norm, index, stride, norms_ptr, coefs_ptr, limits_ptr, limit_bits, ZERO: tl.constexpr):
    """Write a norm at ``index`` and, if there is a pointer for it, its coefficient in the norm's dtype.

    The limit is read from ``limits_ptr`` if there is one, at ``index`` or for a stride of 0 at its beginning.
    """
    rounded = norm.to(norms_ptr.dtype.element_ty)
    tl.store(norms_ptr + index, rounded)
    if coefs_ptr is not None:
        if limits_ptr is not None:
            limit = tl.load(limits_ptr + stride * index).to(tl.float64)
        else:
            limit = _float64(limit_bits)
        tl.store(coefs_ptr + index, _coefficient(rounded, limit, ZERO))


@triton.jit(
    do_not_specialize=["norm_ptr", "clip_coef_ptr", "max_norm_ptr", "max_norm_bits", "p_bits", "chunks"]
)
def finalize_kernel(
    norm_ptr,
    clip_coef_ptr,
    max_norm_ptr,
    max_norm_bits: tl.int64,
    partials_ptr,
    p_bits: tl.int64,
    chunks,
    ORDER: tl.constexpr,
    ZERO: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the norm of all chunks, and the coefficient if there is a pointer for it.

    Runs as one program. It reads 1/4096 of the bytes that norm_kernel reads, but on one SM.
    """
    norm = _joint_norm(partials_ptr, 0, chunks, _float64(p_bits), ORDER, ROW, BLOCK)
    _store_norm(norm, 0, 0, norm_ptr, clip_coef_ptr, max_norm_ptr, max_norm_bits, ZERO)


@triton.jit(
    do_not_specialize=[
        *("norms_ptr", "coefs_ptr", "limits_ptr", "limit_bits", "stride", "positions_ptr", "p_bits")
    ]
)
def finalize_each_kernel(
    norms_ptr,
    coefs_ptr,
    limits_ptr,
    limit_bits: tl.int64,
    stride,
    table_ptr,
    partials_ptr,
    positions_ptr,
    p_bits: tl.int64,
    ORDER: tl.constexpr,
    ZERO: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the norm of each tensor, by a program of its own, and its coefficient as finalize_kernel does."""
    tensor = tl.program_id(0)
    begin, end = tl.load(table_ptr + 3 * tensor + 2), tl.load(table_ptr + 3 * tensor + 5)
    norm = _joint_norm(partials_ptr, begin, end, _float64(p_bits), ORDER, ROW, BLOCK)
    index = tl.load(positions_ptr + tensor)
    _store_norm(norm, index, stride, norms_ptr, coefs_ptr, limits_ptr, limit_bits, ZERO)


@triton.jit(do_not_specialize=["packed_ptr", "positions_ptr", "p_bits", "tensors"])
def finalize_statistics_kernel(
    packed_ptr,
    table_ptr,
    partials_ptr,
    positions_ptr,
    p_bits: tl.int64,
    tensors,
    ORDER: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the column of each tensor, by a program of its own, into the four rows from packed[1] on.

    A row of partials goes on with the largest magnitude of the chunk, its zeros and its non-finite elements.
    """
    tensor = tl.program_id(0)
    begin, end = tl.load(table_ptr + 3 * tensor + 2), tl.load(table_ptr + 3 * tensor + 5)
    column_ptr = packed_ptr + 1 + tl.load(positions_ptr + tensor)
    tl.store(column_ptr, _joint_norm(partials_ptr, begin, end, _float64(p_bits), ORDER, ROW, BLOCK))
    # Three sums at a time: as many lanes as for the norm would spill registers.
    FEWER: tl.constexpr = BLOCK // 4
    bits = tl.zeros((FEWER,), tl.int64)
    zeros = tl.zeros((FEWER,), tl.float64)
    nonfinite = tl.zeros((FEWER,), tl.float64)
    for start in range(begin, end, FEWER):
        chunk = start + tl.arange(0, FEWER)
        row_ptrs = partials_ptr + ROW * chunk
        largest = tl.load(row_ptrs + 2, mask=chunk < end, other=0.0)
        bits = tl.maximum(bits, largest.to(tl.int64, bitcast=True))  # tl.max ignores NaN
        zeros += tl.load(row_ptrs + 3, mask=chunk < end, other=0.0)
        nonfinite += tl.load(row_ptrs + 4, mask=chunk < end, other=0.0)
    tl.store(column_ptr + tensors, tl.max(bits, axis=0).to(tl.float64, bitcast=True))
    tl.store(column_ptr + 2 * tensors, tl.sum(zeros, axis=0))
    tl.store(column_ptr + 3 * tensors, tl.sum(nonfinite, axis=0))
