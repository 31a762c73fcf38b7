"""The Triton kernel of adaptive clipping: units of gradients beside those of weights.

Its table is like the one that kernels.py describes, with other numbers in a row: the address of the gradient,
its number of units and the index of its first run. A run is ``units_per_run`` units of one tensor. A second
table, ``weights_ptr``, holds three int64 per tensor: the address of the weight, the elements of a unit and
``units_per_run``.
"""

# mypy: ignore-errors
# ruff: noqa: SIM300
# (inside @triton.jit, names and comparisons are Triton's)

from __future__ import annotations

import triton
import triton.language as tl

from gradclip_ext.backends.triton.finalize_kernels import _pth_root
from gradclip_ext.backends.triton.kernels import (
    INF,
    MIN_SUM_FLOAT32,
    MIN_SUM_FLOAT64,
    _chunks_forwards,
    _float64,
    _next_tensor,
    _power,
)
from gradclip_ext.backends.triton.update_kernels import _product


@triton.jit
def _unit_ptrs(x_ptr, start, length, units, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return pointers to the elements from ``start`` on of ROWS units, and a mask of those that are there."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = start + tl.arange(0, COLS)[None, :]
    return x_ptr + rows * length + cols, (rows < units) & (cols < length)


@triton.jit
def _are_aligned(address, length, VEC: tl.constexpr):
    """Tell whether every unit begins where 16 bytes can be accessed at a time, and ends at such a place."""
    return (address % 16 == 0) & (length % VEC == 0)


@triton.jit
def _load_units(address, start, length, units, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the elements from ``start`` on of ROWS units as [ROWS, COLS], with zeros where there are none.

    The branch holds only the load, so that a norm has the same bits at any alignment.
    """
    VEC: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    if _are_aligned(address, length, VEC):
        x_ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        # Triton derives from this product that the units are aligned, and the ends of the mask.
        ptrs, mask = _unit_ptrs(x_ptr, start, length // VEC * VEC, units, ROWS, COLS)
        x = tl.load(ptrs, mask=mask, other=0.0)
    else:
        ptrs, mask = _unit_ptrs(address.to(tl.pointer_type(DTYPE)), start, length, units, ROWS, COLS)
        x = tl.load(ptrs, mask=mask, other=0.0)
    return x


@triton.jit
def _scale_units(
    address, start, length, units, coefs, ROWS: tl.constexpr, COLS: tl.constexpr, DTYPE: tl.constexpr
):
    """Multiply the elements from ``start`` on of ROWS units by coefficients [ROWS, 1], unless those are 1."""
    VEC: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    if _are_aligned(address, length, VEC):
        x_ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        ptrs, mask = _unit_ptrs(x_ptr, start, length // VEC * VEC, units, ROWS, COLS)
        mask = mask & (coefs != 1.0)
        tl.store(ptrs, _product(tl.load(ptrs, mask=mask), coefs, False), mask=mask)
    else:
        ptrs, mask = _unit_ptrs(address.to(tl.pointer_type(DTYPE)), start, length, units, ROWS, COLS)
        mask = mask & (coefs != 1.0)
        tl.store(ptrs, _product(tl.load(ptrs, mask=mask), coefs, False), mask=mask)


@triton.jit
def _scaled_sums(
    address,
    length,
    units,
    scale,
    p,
    ORDER: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Return the sum of (|x| / scale)^p of each of ROWS units in float64."""
    sums = tl.zeros((ROWS,), tl.float64)
    for start in range(0, length, COLS):
        x = _load_units(address, start, length, units, DTYPE, ROWS, COLS).to(tl.float64)
        sums += tl.sum(_power(tl.abs(x) / scale[:, None], p, ORDER), axis=1)
    return sums


@triton.jit
def _unit_norms(
    address,
    length,
    units,
    p,
    ORDER: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Return the norm of each of ROWS units in float64, computed as in norm_kernel.

    A lane adds 8 terms in FLOAT, and at most 128 lanes their sums pairwise, before these are added in
    float64: 16 roundings with that of a square are at most 16/2 * 2^-24 = 4.8e-7 of a norm.
    """
    FLOAT: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    INT: tl.constexpr = tl.int64 if DTYPE == tl.float64 else tl.int32
    MIN_SUM: tl.constexpr = MIN_SUM_FLOAT64 if DTYPE == tl.float64 else MIN_SUM_FLOAT32
    sums = tl.zeros((ROWS,), tl.float64)
    largest = tl.zeros((ROWS,), INT)
    for start in range(0, length, COLS):
        x = _load_units(address, start, length, units, DTYPE, ROWS, COLS).to(FLOAT)
        if ORDER == 2.0:
            sums += tl.sum(x * x, axis=1).to(tl.float64)
        elif ORDER == 1.0:
            sums += tl.sum(tl.abs(x), axis=1).to(tl.float64)
        largest = tl.maximum(largest, tl.max(tl.abs(x).to(INT, bitcast=True), axis=1))
    norms = largest.to(FLOAT, bitcast=True).to(tl.float64)
    if ORDER != INF:
        is_ordinary = (norms > 0.0) & (norms < INF)
        is_lost = is_ordinary & ((sums < MIN_SUM) | (sums == INF))
        scale = tl.where(is_lost, norms, tl.full((), 1.0, tl.float64))
        if tl.max(is_lost.to(tl.int32), axis=0) > 0:
            # Fewer elements at a time, because float64 takes more registers. A quarter of a narrow tile is
            # what Triton 3.6 fails to compile for AMD's GPUs.
            FEWER: tl.constexpr = COLS // 4 if COLS > 256 else COLS
            again = _scaled_sums(address, length, units, scale, p, ORDER, DTYPE, ROWS, FEWER)
            sums = tl.where(is_lost, again, sums)
        norms = tl.where(is_ordinary, scale * _pth_root(sums, p, ORDER), norms)
    return norms


@triton.jit(do_not_specialize=["factor_bits", "eps_bits", "weights_ptr", "p_bits", "first", "last"])
def adaptive_kernel(
    factor_bits: tl.int64,
    eps_bits: tl.int64,
    table_ptr,
    weights_ptr,
    p_bits: tl.int64,
    first,
    last,
    DTYPE: tl.constexpr,
    WEIGHT: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Scale the units of the gradients [first, last) as AdaptiveRule in norms.py says, ROWS units at a time.

    A unit is scaled while it is in L1 or L2. Units that are not clipped are not written.
    """
    p = _float64(p_bits)
    begin, end, tensor = _chunks_forwards(table_ptr, first, last)
    least = tl.full((), 1e-6, tl.float64)
    for run in range(begin, end):
        tensor = _next_tensor(table_ptr, tensor, run)
        row_ptr = table_ptr + 3 * tensor
        length = tl.load(weights_ptr + 3 * tensor + 1).to(tl.int32)
        per_run = tl.load(weights_ptr + 3 * tensor + 2)
        skipped = (run - tl.load(row_ptr + 2)) * per_run
        units = tl.minimum(tl.load(row_ptr + 1) - skipped, per_run).to(tl.int32)
        grad = tl.load(row_ptr) + skipped * length * (DTYPE.primitive_bitwidth // 8)
        weight = tl.load(weights_ptr + 3 * tensor) + skipped * length * (WEIGHT.primitive_bitwidth // 8)
        for unit in range(0, units, ROWS):
            norms = _unit_norms(grad, length, units - unit, p, ORDER, DTYPE, ROWS, COLS)
            limits = _unit_norms(weight, length, units - unit, p, ORDER, WEIGHT, ROWS, COLS)
            eps = _float64(eps_bits)
            limits = _float64(factor_bits) * tl.where(limits < eps, eps, limits)  # NaN stays NaN
            coefs = limits / tl.where(norms < least, least, norms)
            coefs = tl.where(norms < limits, tl.full((), 1.0, tl.float64), coefs)
            if tl.max((coefs != 1.0).to(tl.int32), axis=0) > 0:
                for start in range(0, length, COLS):
                    _scale_units(grad, start, length, units - unit, coefs[:, None], ROWS, COLS, DTYPE)
            grad += ROWS * length * (DTYPE.primitive_bitwidth // 8)
            weight += ROWS * length * (WEIGHT.primitive_bitwidth // 8)
