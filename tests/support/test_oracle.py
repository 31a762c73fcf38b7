"""The comparisons of oracle.py must be able to fail: each gets results that are slightly wrong."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import REAL_DTYPES, clones, name_of, over_real_dtypes, random
from oracle import parameter

import gradclip_ext
from gradclip_ext import reference


def clipped(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Return gradients after, gradients before, and the norm of one honest call."""
    grads = [random(9, dtype=dtype), random(4, 5, dtype=dtype)]
    before = clones(grads)
    return grads, before, gradclip_ext.clip_grad_norm_([parameter(g) for g in grads], 0.5)


@over_real_dtypes
def test_honest_results_pass(dtype: torch.dtype) -> None:
    grads, before, norm = clipped(dtype)
    oracle.assert_norm(norm, before, 2.0)
    oracle.assert_scaled(grads, before, norm, 0.5)
    oracle.assert_clipped_like_torch(grads, before, 0.5, 2.0)


@over_real_dtypes
def test_two_ulp_are_noticed(dtype: torch.dtype) -> None:
    grads, before, norm = clipped(dtype)
    # Away from zero twice: rounding may already have used one ulp in the other direction.
    for _ in range(3):
        grads[1][2, 3] = torch.nextafter(grads[1][2, 3], grads[1][2, 3] * 2)
    with pytest.raises(AssertionError, match=r"off by \d ulp"):
        oracle.assert_scaled(grads, before, norm, 0.5)


def test_wrong_norms_are_noticed() -> None:
    _, before, norm = clipped(torch.float32)
    for lie in (
        norm * (1 + 2e-6),
        norm * (1 - 2e-6),
        norm * math.nan,
        norm * math.inf,
        norm.double(),
        norm[None],
    ):
        with pytest.raises(AssertionError):
            oracle.assert_norm(lie, before, 2.0)
    with pytest.raises(AssertionError):
        oracle.assert_norm(norm, before, 3.0)
    with pytest.raises(AssertionError):
        oracle.assert_norm(norm, before[:1], 2.0)


def test_bfloat16_norm_of_torch_is_noticed() -> None:
    """The suite would reject torch's own half norm: three digits are not within 1e-6."""
    grads = [random(1000, dtype=torch.bfloat16) for _ in range(3)]
    rejected = 0
    for grad in grads:
        try:
            oracle.assert_norm(oracle.torch_get_total_norm(grad).float(), [grad], 2.0)
        except AssertionError:
            rejected += 1
    assert rejected


def test_unclipped_gradient_is_noticed() -> None:
    grads, before, norm = clipped(torch.float32)
    grads[0].copy_(before[0])
    with pytest.raises(AssertionError, match="gradient 0"):
        oracle.assert_scaled(grads, before, norm, 0.5)
    with pytest.raises(AssertionError, match="gradient 0"):
        oracle.assert_clipped_like_torch(grads, before, 0.5, 2.0)


@over_real_dtypes
@pytest.mark.parametrize("lie", [math.nan, math.inf, -math.inf, -1.0])
def test_special_values_at_other_places_are_noticed(dtype: torch.dtype, lie: float) -> None:
    honest = torch.tensor([1.0, math.nan, math.inf, -math.inf], dtype=dtype)
    oracle.assert_within_ulps(honest, honest.clone(), 0)
    for position, value in enumerate(honest.tolist()):
        other = honest.clone()
        other[position] = lie
        if value != lie and not (math.isnan(value) and math.isnan(lie)):
            with pytest.raises(AssertionError):
                oracle.assert_within_ulps(other, honest, 0)


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=name_of)
def test_ulp_distance(dtype: torch.dtype) -> None:
    x = random(50, dtype=dtype)
    up = torch.nextafter(x, torch.full_like(x, math.inf))
    assert (oracle.ulp_distance(up, x) == 1).all() and (oracle.ulp_distance(x, x) == 0).all()
    assert (oracle.ulp_distance(torch.nextafter(up, torch.full_like(x, math.inf)), x) == 2).all()
    tiny = torch.nextafter(torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype))
    assert oracle.ulp_distance(tiny, -tiny).item() == 2
    assert oracle.ulp_distance(tiny * 0, -(tiny * 0)).item() == 0


def test_changes_are_noticed_bit_for_bit_and_in_the_gaps() -> None:
    base = random(6, 4)
    view = base[:, 1]
    for index, value in (((0, 1), 0.0), ((2, 1), math.nan), ((3, 0), 5.0)):
        with pytest.raises(AssertionError, match="changed"), oracle.unchanged([view]):
            base[index] = value
    zero = torch.zeros(1)
    with pytest.raises(AssertionError, match="changed"), oracle.unchanged([zero]):
        zero.neg_()  # -0 equals 0, but it is another bit
    old = oracle.gaps(view)
    base[5, 3] += 1
    with pytest.raises(AssertionError):
        oracle.assert_same_bits(oracle.gaps(view), old)
    assert oracle.gaps(view).numel() == 18


def test_reference_agrees_with_numbers_known_by_heart() -> None:
    tensors = [torch.tensor([3.0]), torch.tensor([[0.0, -4.0]]), torch.empty(0)]
    known = {
        2.0: 5.0,
        1.0: 7.0,
        math.inf: 4.0,
        -math.inf: 0.0,
        0.0: 2.0,
        0.5: (3**0.5 + 2) ** 2,
        3.0: 91 ** (1 / 3),
    }
    for norm_type, value in known.items():
        assert reference.total_norm(tensors, norm_type) == pytest.approx(value, rel=1e-15)
    assert reference.total_norm([], 2.0) == 0.0
    assert reference.norms(tensors) == [3.0, 4.0, 0.0] and reference.norms(tensors, 0.0) == [1.0, 1.0, 0.0]
    assert reference.statistics(tensors) == [(3.0, 3.0, 0, 0), (4.0, 4.0, 1, 0), (0.0, 0.0, 0, 0)]
    assert reference.statistics([torch.tensor([math.inf, -0.0])]) == [(math.inf, math.inf, 1, 1)]
    assert reference.clip_coef(1.0, 4.0) == pytest.approx(0.25, rel=1e-6)
    assert reference.clip_coef(9.0, 4.0) == 1.0 and reference.clip_coef(math.inf, math.nan) == 1.0
    assert math.isnan(reference.clip_coef(1.0, math.nan))
    assert reference.scale(tensors, 0.5)[1].tolist() == [[0.0, -2.0]]
    grad, weight = torch.tensor([[3.0, 4.0], [0.1, 0.0]]), torch.tensor([[0.0, 0.5], [2.0, 0.0]])
    clipped = reference.adaptive_clip([grad, grad[0]], [weight, weight[0]], 0.5, 0.001)
    torch.testing.assert_close(clipped[0], torch.tensor([[0.15, 0.2], [0.1, 0.0]]).double())
    assert clipped[1].tolist() == pytest.approx([0.15, 0.2])
    assert reference.clamp(tensors, -1.0, 2.0)[1].tolist() == [[0.0, -1.0]]
