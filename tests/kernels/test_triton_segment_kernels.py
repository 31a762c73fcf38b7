"""The Triton kernels with a result or a coefficient for each tensor or unit, in Triton's interpreter.

test_triton_interpreted.py runs this file. What every backend must do is in the shared suite; here is what
only these kernels can get wrong.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton_inputs import (
    DTYPES,
    ORDERS,
    at_offset,
    backend,
    borders,
    chunk_numel,
    clones,
    interpreted,
    over_dtypes,
    over_orders,
    same,
)

from gradclip_ext import reference
from gradclip_ext.backends.base import TensorList
from gradclip_ext.backends.triton import memory, units
from gradclip_ext.norms import REPORT, AdaptiveRule, Rule

pytestmark = interpreted
NAN, INF = math.nan, math.inf


def mixed() -> list[Tensor]:
    """Return tensors of all dtypes in turn, empty ones among them, one of them over many chunks."""
    sizes = (3, 40, 33_001, 1, 20_000, 0, 100_000, 5, 0, 9_999)
    return [torch.randn(size).to(DTYPES[i % 4]) for i, size in enumerate(sizes)]


def joint_norm(tensor: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    return backend.norm(TensorList([tensor]), p, REPORT, dtype)[0]


# ---------------------------------------------------------------- scale


@over_dtypes
def test_each_is_scaled_by_its_coefficient(dtype: torch.dtype) -> None:
    """The bits of scaling alone, +0.0 for a negative coefficient, and nothing written for 1 or more."""
    values = [0.25, -1.0, 1.0, 0.5, 7.0, 0.0, -1.0, 0.125, INF]
    grads = borders(dtype)
    for grad in grads:
        grad[-1] = -3.0
    grads[1][0], grads[6][5] = NAN, -INF
    before = clones(grads)
    for coefs in (torch.tensor(values), torch.tensor(values, dtype=torch.float64)):
        scaled = clones(before)
        backend.scale_(TensorList(scaled), coefs, may_zero=True)
        for grad, old, value in zip(scaled, before, values):
            expected = torch.zeros_like(old) if value < 0.0 else old * min(value, 1.0)
            assert same(grad, expected), (dtype, value)


def test_order_of_coefficients_in_mixed_lists() -> None:
    """A table is ordered by dtype and has no empty tensors; a vector is as the list is."""
    grads = mixed()
    before = clones(grads)
    coefs = torch.tensor([2.0**-i for i in range(len(grads))]) / 2
    backend.scale_(TensorList(grads), coefs)
    for grad, old, coef in zip(grads, before, coefs):
        assert same(grad, old * coef)


def test_a_coefficient_of_every_second_element() -> None:
    grads = [torch.ones(3), torch.ones(4)]
    backend.scale_(TensorList(grads), torch.tensor([0.5, 9.0, 0.25, 9.0])[::2])
    assert grads[0].tolist() == [0.5] * 3 and grads[1].tolist() == [0.25] * 4


@pytest.mark.parametrize("coef", [-1.0, 0.5, 1.0])
def test_one_coefficient_that_may_be_zero(coef: float) -> None:
    grads = mixed()
    grads[2][7] = NAN
    before = clones(grads)
    backend.scale_(TensorList(grads), torch.tensor(coef), may_zero=True)
    for grad, old in zip(grads, before):
        assert same(grad, torch.zeros_like(old) if coef < 0.0 else old * coef)


@over_dtypes
def test_zeroing_at_any_alignment(dtype: torch.dtype) -> None:
    for offset in (0, 1, 3):
        grad = at_offset(torch.full((chunk_numel(dtype) + 77,), NAN, dtype=dtype), offset)
        backend.scale_(TensorList([grad]), torch.tensor([-1.0]), may_zero=True)
        assert same(grad, torch.zeros_like(grad)), offset


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("zero", [False, True])
def test_coefficients_are_those_of_the_rule(dtype: torch.dtype, zero: bool) -> None:
    """The bits of Rule.clip_coef, for limits that nobody can check and norms of every kind."""
    firsts = (1.0, 0.0, NAN, INF, 3e38, 1e-30)
    limits = [0.0, 0.3, 1e300, INF, -2.0, -INF, NAN]
    grads = [torch.tensor([first, 0.5 if first == 1.0 else 0.0]).to(dtype) for first in firsts]
    of_dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for limit in [
        *(torch.tensor(v, dtype=torch.float64).to(d) for v in limits for d in of_dtypes),
        0.0,
        0.3,
        1e300,
        INF,
    ]:
        rule = Rule(limit, zero_if_nonfinite=zero)
        for grad in grads:
            norm, coef = backend.norm(TensorList([grad]), 2.0, rule, dtype)
            expected = torch.as_tensor(rule.clip_coef(norm), dtype=dtype)
            coef = torch.as_tensor(coef, dtype=dtype)
            assert torch.equal(coef.nan_to_num(7.0), expected.nan_to_num(7.0)), (limit, norm, coef, expected)


# ---------------------------------------------------------------- norms of each


@over_orders
def test_norms_and_scaling_of_each_are_those_alone(p: float) -> None:
    """The bits of a call for each tensor, whatever stands beside it."""
    for limits in (0.5, torch.rand(10).double() * 50):
        grads, alone = mixed(), []
        before = clones(grads)
        rule = Rule(limits, zero_if_nonfinite=True)
        norms = backend.clip_each_(TensorList(grads), p, rule, torch.float64)
        for index, old in enumerate(before):
            limit = limits[index] if isinstance(limits, Tensor) and limits.dim() else limits
            norm = torch.zeros((), dtype=torch.float64)
            if old.numel():
                of_one = TensorList([old])
                norm, coef = backend.norm(of_one, p, Rule(limit, zero_if_nonfinite=True), torch.float64)
                backend.scale_(of_one, coef, may_zero=True)
            alone.append(norm)
            assert same(grads[index], old), (p, index)
        assert same(norms, torch.stack(alone))


def test_norms_of_each_in_range_and_beyond() -> None:
    grads = [torch.randn(40_000) * scale for scale in (1e-38, 1e-25, 1.0, 1e18, 1e37)]
    grads += [torch.tensor([1.0, NAN]), torch.tensor([INF, 1.0]), torch.zeros(30_000), torch.empty(0)]
    for p in (1.0, 2.0, 3.0, INF):
        norms = backend.clip_each_(TensorList(grads), p, REPORT, torch.float64)
        for norm, grad in zip(norms.tolist(), grads):
            assert norm == pytest.approx(reference.total_norm([grad], p), rel=1e-6, nan_ok=True)


def test_lists_without_elements() -> None:
    empty = TensorList([torch.empty(0), torch.empty(0, 3).half()])
    assert backend.clip_each_(empty, 2.0, Rule(1.0), torch.float32).tolist() == [0.0, 0.0]
    assert backend.statistics(empty, 2.0).tolist() == [0.0] * 9
    backend.scale_(empty, torch.tensor([0.5, 0.5]))
    backend.clip_adaptive_(empty, empty, AdaptiveRule(2.0, 0.1, 1e-3))


# ---------------------------------------------------------------- statistics


@over_orders
def test_statistics(p: float) -> None:
    grads = [*mixed(), torch.tensor([NAN, 0.0, -0.0, INF]), torch.tensor([-INF, 2.0]).half()]
    grads += [torch.zeros(20_000), torch.randn(17_000) * 1e-30, torch.tensor([1e-45, 0.0])]
    grads[4][::7] = 0.0
    packed = backend.statistics(TensorList(grads), p)
    assert packed.dtype == torch.float64 and packed.shape == (1 + 4 * len(grads),)
    norms, largest, zeros, nonfinite = packed[1:].view(4, -1)
    assert packed[0].isnan()
    each = backend.clip_each_(TensorList(grads), p, REPORT, torch.float64)
    assert torch.equal(norms.nan_to_num(7.0), each.nan_to_num(7.0))
    assert zeros.tolist() == [t.numel() - int(t.count_nonzero()) for t in grads]
    assert nonfinite.tolist() == [int((~t.isfinite()).sum()) for t in grads]
    exact = torch.stack([t.double().abs().amax() if t.numel() else torch.tensor(0.0).double() for t in grads])
    assert torch.equal(largest.nan_to_num(7.0), exact.nan_to_num(7.0))
    finite = mixed()
    total = backend.norm(TensorList(finite), p, REPORT, torch.float64)[0]
    assert same(backend.statistics(TensorList(finite), p)[0], total)


@over_dtypes
def test_statistics_at_any_alignment(dtype: torch.dtype) -> None:
    values = torch.randn(chunk_numel(dtype) + 1001).to(dtype)
    values[::5], values[13] = 0.0, INF
    found = [backend.statistics(TensorList([at_offset(values, offset)]), 2.0) for offset in (0, 1, 3)]
    assert all(same(one, found[0]) for one in found)
    assert found[0][3] == (values == 0).sum() and found[0][4] == 1


# ---------------------------------------------------------------- units


def assert_adaptive(grads: list[Tensor], weights: list[Tensor], p: float = 2.0) -> list[Tensor]:
    """Compare with float64; return what was clipped."""
    clipped = clones(grads)
    backend.clip_adaptive_(TensorList(clipped), TensorList(weights), AdaptiveRule(p, 0.1, 1e-3))
    exact = reference.adaptive_clip(grads, weights, 0.1, 1e-3, p)
    for grad, expected in zip(clipped, exact):
        rounded, finfo = expected.to(grad.dtype), torch.finfo(grad.dtype)
        rtol = 1e-6 + finfo.eps  # two norms and a product; the interpreter truncates to bfloat16
        torch.testing.assert_close(grad, rounded, rtol=rtol, atol=finfo.smallest_normal, equal_nan=True)
    return clipped


def pairs(*shapes: tuple[int, ...], dtype: torch.dtype, of_weights: torch.dtype) -> list[list[Tensor]]:
    scales = [torch.rand(s[:1] + (1,) * (len(s) - 1)) * 2 for s in shapes]
    grads = [(torch.randn(s) * scale).to(dtype) for s, scale in zip(shapes, scales)]
    return [grads, [(torch.randn(s) * 10).to(of_weights) for s in shapes]]


SHAPES = [(), (7,), (40, 1), (33, 16), (5, 17), (3, 256), (9, 257), (6, 1024), (5, 1030), (2, 5000), (0, 3)]


@over_dtypes
def test_units_around_the_widths_of_tiles(dtype: torch.dtype) -> None:
    for of_weights in {dtype, torch.float32}:
        grads, weights = pairs(*SHAPES, dtype=dtype, of_weights=of_weights)
        for p in (2.0,) if of_weights != dtype else (1.0, 2.0, 3.0, INF):
            assert_adaptive(grads, weights, p)


def test_large_units_are_clipped_by_the_kernels_for_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "_MAX_UNIT_BYTES", 2000)
    monkeypatch.setattr(memory, "_workspaces", {})
    grads, weights = pairs(
        (3, 900), (3, 40), (20_000,), (2, 2), dtype=torch.float32, of_weights=torch.float64
    )
    grads[0][1, 5] = NAN
    assert_adaptive(grads, weights)


def test_units_in_range_and_beyond() -> None:
    """A unit that overflows, that vanishes, that is zero or not finite says nothing of its neighbours."""
    scales = torch.tensor([1.0, 1e30, 1e-30, 0.0, 1.0, 1.0, 1e-42, 1e36])[:, None]
    for length in (9, 100, 1500):
        grads = [torch.rand(8, length).add(0.1) * scales]
        grads[0][4, 3], grads[0][5, 3] = NAN, -INF
        for p in (1.0, 2.0, 3.0, INF):
            assert_adaptive(grads, [torch.ones(8, length)], p)
            assert_adaptive([torch.ones(8, length)], grads, p)


@over_dtypes
def test_units_at_any_alignment(dtype: torch.dtype) -> None:
    for length in (16, 300):
        grads, weights = pairs((9, length), dtype=dtype, of_weights=dtype)
        results = []
        for offset in (0, 1, 3):
            grad = at_offset(grads[0].flatten(), offset).view(9, length)
            weight = at_offset(weights[0].flatten(), (offset + 1) % 2).view(9, length)
            backend.clip_adaptive_(TensorList([grad]), TensorList([weight]), AdaptiveRule(2.0, 0.1, 1e-3))
            results.append(grad)
        assert all(same(result.contiguous(), results[0].contiguous()) for result in results)


def test_only_clipped_tensors_and_units_are_stored(stored: list[int]) -> None:
    grads = [torch.randn(20_000), torch.randn(30)]
    backend.scale_(TensorList(grads), torch.tensor([1.0, 0.5]))
    assert sum(stored) == 30
    backend.scale_(TensorList(grads), torch.tensor(1.0), may_zero=True)
    assert sum(stored) == 30
    stored.clear()
    grad, weight = torch.ones(40, 12), torch.full((40, 12), 100.0)
    grad[7] = 50.0
    backend.clip_adaptive_(TensorList([grad]), TensorList([weight]), AdaptiveRule(2.0, 0.1, 1e-3))
    assert sum(stored) == 12


def test_same_bits_for_any_number_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for programs in (1, 2, 64):
        monkeypatch.setattr(memory, "_workspaces", {})
        monkeypatch.setattr(memory, "_INTERPRETED_PROGRAMS", programs)
        torch.manual_seed(1)
        grads = mixed()
        found = [backend.statistics(TensorList(grads), p) for p in ORDERS]
        found.append(backend.clip_each_(TensorList(grads), 2.0, Rule(1.0), torch.float32))
        units_of, weights = pairs((50, 700), (60, 9), dtype=torch.float16, of_weights=torch.float32)
        backend.clip_adaptive_(TensorList(units_of), TensorList(weights), AdaptiveRule(2.0, 0.1, 1e-3))
        results.append([*found, *grads, *units_of])
    for result in results[1:]:
        assert all(same(a, b) for a, b in zip(result, results[0]))
