"""clip_grad_norm_ and get_total_norm: what NaN and infinities do, and error_if_nonfinite."""

from __future__ import annotations

import math
import warnings

import oracle
import pytest
import torch
from cases import DTYPES, NORM_TYPES, Target, clones, grads_of, name_of, over_norm_types, random
from oracle import parameter, torch_clip_grad_norm_

import gradclip_ext

NAN, INF = math.nan, math.inf

SENTENCE = (
    "The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
    "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
    "`error_if_nonfinite=False`"
)


def spoiled(backend: Target, *values: float, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return gradients that hold the given values at random places of different tensors."""
    grads = [
        backend.random(7, 5, dtype=dtype),
        backend.random(dtype=dtype),
        backend.random(2000, dtype=dtype),
    ]
    for grad, value in zip(reversed(grads), values):
        grad.view(-1)[torch.randint(grad.numel(), ()).item()] = value
    return grads


@over_norm_types
@pytest.mark.parametrize("values", [(NAN,), (INF,), (-INF,), (NAN, INF), (INF, -INF), (INF, NAN)], ids=str)
def test_like_torch(backend: Target, values: tuple, norm_type: float) -> None:
    """The same norm, and NaN, inf and zeros at the same places; a twin in float32 for the half types."""
    for dtype in DTYPES:
        grads = spoiled(backend, *values, dtype=dtype)
        twins = [parameter(g) for g in oracle.upcast(grads)]
        params, before = [parameter(g) for g in grads], clones(grads)
        theirs = torch_clip_grad_norm_(twins, 1.0, norm_type)
        norm = backend.clip_grad_norm_(params, 1.0, norm_type)
        oracle.assert_same_specials(norm.double(), theirs.double(), f"norm, {dtype}")
        if dtype.is_complex and norm.isfinite():
            continue  # torch multiplies inf+0j by 1 to inf+nanj; where nothing is written it stays
        oracle.assert_scaled(grads, before, norm, 1.0, f"{dtype}")
        for grad, twin in zip(grads, twins):
            oracle.assert_same_specials(grad, twin.grad, f"{dtype}")


@pytest.mark.parametrize("norm_type", [p for p in NORM_TYPES if p], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_nan_is_seen_wherever_it_is(backend: Target, dtype: torch.dtype, norm_type: float) -> None:
    """fmaxf and tl.maximum ignore NaN, and a vector loop may miss its tail."""
    for position in (0, 1, 15, 16, 1023, 1024, 4095, 20_000):
        grad = backend.random(20_001, dtype=dtype)
        grad[position] = NAN
        params = [parameter(backend.random(3)), parameter(grad), parameter(backend.random(5))]
        assert backend.clip_grad_norm_(params, 1.0, norm_type).isnan(), position
        assert all(g.isnan().all() for g in grads_of(params)), position


def test_an_infinity_zeroes_the_finite_and_becomes_nan(backend: Target) -> None:
    params = backend.parameters((4,), (3,))
    params[0].grad[2] = -INF
    assert backend.clip_grad_norm_(params, 1.0) == INF
    assert params[0].grad.isnan().tolist() == [False, False, True, False]
    assert not params[1].grad.any()


@pytest.mark.parametrize("values", [(NAN,), (INF,)])
def test_max_norm_inf_scales_nothing_whatever_the_norm(backend: Target, values: tuple) -> None:
    """torch makes everything NaN."""
    grads = spoiled(backend, *values)
    with oracle.unchanged(grads):
        norm = backend.clip_grad_norm_([parameter(g) for g in grads], INF)
        backend.clip_grads_with_norm_([parameter(g) for g in grads], INF, norm)
    oracle.assert_same_specials(norm.cpu(), torch.tensor(values[0]))


# ---------------------------------------------------------------- error_if_nonfinite


@pytest.mark.parametrize("values", [(NAN,), (INF,), (NAN, INF)], ids=str)
@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, INF], ids=name_of)
def test_error_comes_before_any_change(backend: Target, norm_type: float, values: tuple) -> None:
    grads = spoiled(backend, *values)
    versions = [g._version for g in grads]
    for max_norm in (0.0, 1.0, INF):
        with oracle.unchanged(grads), pytest.raises(RuntimeError) as caught:
            backend.clip_grad_norm_(
                [parameter(g) for g in grads], max_norm, norm_type, error_if_nonfinite=True
            )
        assert SENTENCE.format(norm_type=norm_type) in str(caught.value)
        assert all(g._version == v for g, v in zip(grads, versions)), "autograd was told of a change"


def test_error_names_the_first_culprit_by_its_place_in_the_list(backend: Target) -> None:
    """The index counts what the caller listed: a frozen parameter and a duplicate included."""
    params = backend.parameters((2,), (4, 3), (5,), (0,))
    params[1].grad[1, 1] = INF
    params[2].grad[0] = NAN
    frozen = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"tensor 3 of the list, shape \(4, 3\)"):
        backend.clip_grad_norm_([frozen, params[0], params[0], *params[1:]], 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match=r"tensor 1 of the list, shape \(4, 3\)"):
        backend.get_total_norm(grads_of(params), error_if_nonfinite=True)


def test_error_when_the_norm_alone_overflows(backend: Target) -> None:
    params = [parameter(torch.full((3,), 3e38, device=backend.device)) for _ in range(2)]
    with oracle.unchanged(grads_of(params)), pytest.raises(RuntimeError, match="Every gradient is finite"):
        backend.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)


def test_no_error_for_a_finite_norm(backend: Target) -> None:
    params = backend.parameters((4,), (3,))
    before = clones(grads_of(params))
    norm = backend.clip_grad_norm_(params, 0.5, error_if_nonfinite=True)
    oracle.assert_norm(norm, before, 2.0)
    oracle.assert_scaled(grads_of(params), before, norm, 0.5)


def test_get_total_norm_reports_or_raises(backend: Target) -> None:
    for value in (NAN, INF):
        grads = spoiled(backend, value)
        oracle.assert_same_specials(backend.get_total_norm(grads).cpu(), torch.tensor(value))
        with pytest.raises(RuntimeError, match="non-finite"):
            backend.get_total_norm(grads, error_if_nonfinite=True)


def test_error_does_not_look_into_the_grad_of_activations() -> None:
    """get_total_norm takes tensors themselves; asking a non-leaf for .grad makes torch warn."""
    activation = torch.ones(2, requires_grad=True) * random(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=r"tensor 1 of the list, shape \(3,\)"):
            gradclip_ext.get_total_norm([activation, torch.full((3,), INF)], error_if_nonfinite=True)
