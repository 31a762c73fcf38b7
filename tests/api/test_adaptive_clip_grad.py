"""adaptive_clip_grad_: each slice of a gradient beside the same slice of its weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import oracle
import pytest
import torch
from cases import CONTAINERS, Target, clones, grads_of, name_of, over_dtypes, raises_untouched, random
from oracle import parameter
from torch import Tensor

import gradclip_ext
from gradclip_ext import reference

NAN, INF = math.nan, math.inf
SHAPES = [
    (),
    (1,),
    (7,),
    (5, 3),
    (1, 9),
    (4, 1),
    (3, 4, 5),
    (2, 3, 4, 5),
    (2, 3, 2, 2, 3),
    (0,),
    (0, 4),
    (4, 0),
]


def with_weights(
    backend: Target, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return parameters whose gradients' units exceed their limit or not, about half of them."""
    params = []
    for shape in shapes:
        weight = torch.nn.Parameter(backend.random(*shape, dtype=dtype) * 10)
        scale = torch.rand(shape[:1] + (1,) * (len(shape) - 1)) * 2
        weight.grad = (backend.random(*shape, dtype=dtype) * scale.to(backend.device)).to(dtype)
        params.append(weight)
    return params


def assert_adaptive(
    params: Sequence[Tensor],
    before: Sequence[Tensor],
    clip_factor: float,
    eps: float = 1e-3,
    norm_type: float = 2.0,
    what: str = "",
) -> None:
    """Compare with float64: two norms within 5e-7 each, and half an eps each for coefficient and product.

    Where a norm is so close to its limit that rounding decides, clipping changes less than that.
    """
    weights = [p.detach() for p in params]
    exact = reference.adaptive_clip(before, weights, clip_factor, eps, norm_type)
    for index, (param, expected, old) in enumerate(zip(params, exact, before, strict=True)):
        where = f"{what}, gradient {index}"
        rounded = expected.to(old.dtype)
        oracle.assert_same_specials(param.grad.cpu(), rounded, where)
        rtol = 1e-13 if old.dtype is torch.float64 else 1e-6 + torch.finfo(old.dtype).eps
        tiny = torch.finfo(old.dtype).smallest_normal
        torch.testing.assert_close(param.grad.cpu(), rounded, rtol=rtol, atol=tiny, equal_nan=True)


# ---------------------------------------------------------------- against float64


@over_dtypes
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, INF], ids=name_of)
def test_shapes(backend: Target, norm_type: float, dtype: torch.dtype) -> None:
    for clip_factor in (0.0, 0.01, 0.2, 1e6):
        params = with_weights(backend, SHAPES, dtype)
        before = clones(grads_of(params))
        assert backend.adaptive_clip_grad_(params, clip_factor, 1e-3, norm_type) is None
        assert_adaptive(params, before, clip_factor, 1e-3, norm_type, f"{clip_factor}")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "gaps between units": lambda t: torch.stack([t, t], dim=1)[:, 0],
}


@pytest.mark.parametrize("of", ["weight", "gradient", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Target, layout: str, of: str) -> None:
    """Kernels need each unit as one range of memory; foreach handles others, whatever stands beside."""
    params = with_weights(backend, [(3, 4, 5, 2), (5, 2, 3, 3), (6,)])
    for param in params[:2]:
        if of != "gradient":
            param.data = LAYOUTS[layout](param.data)
        if of != "weight":
            param.grad = LAYOUTS[layout](param.grad)
    before, outside = clones(grads_of(params)), [oracle.gaps(g) for g in grads_of(params)]
    with oracle.unchanged([p.detach() for p in params], layout):
        backend.adaptive_clip_grad_(params, 0.05)
    assert_adaptive(params, before, 0.05, what=layout)
    for grad, old in zip(grads_of(params), outside):
        oracle.assert_same_bits(oracle.gaps(grad), old, layout)


def test_many_chunks_and_threads(backend: Target) -> None:
    """Long units, many short ones, one that is the whole tensor."""
    shapes = [(3, 50_000), (2_000, 70), (300_001,), (300, 500), (2, 3), (1_000, 1, 3, 3), (130, 32), (67, 1)]
    params = with_weights(backend, shapes)
    before = clones(grads_of(params))
    backend.adaptive_clip_grad_(params, 0.05)
    assert_adaptive(params, before, 0.05)


def test_weights_of_another_dtype(backend: Target) -> None:
    params = with_weights(backend, [(4, 30), (9,), (2, 2)], torch.bfloat16)
    for param, dtype in zip(params, (torch.float32, torch.float64, torch.float16)):
        param.data = param.data.to(dtype)
    if any(p.grad is None or p.grad.dtype is not torch.bfloat16 for p in params):
        pytest.skip("this torch does not keep a gradient whose dtype is not its weight's")
    before = clones(grads_of(params))
    backend.adaptive_clip_grad_(params, 0.05)
    assert_adaptive(params, before, 0.05)


def test_values_beyond_the_range_of_squares(backend: Target) -> None:
    for scale in (1e-200, 1e200):
        params = with_weights(backend, [(3, 4), (5,)], torch.float64)
        for param in params:
            param.data *= scale
            param.grad *= scale
        before = clones(grads_of(params))
        backend.adaptive_clip_grad_(params, 0.05, eps=0.0)
        assert_adaptive(params, before, 0.05, 0.0)


@pytest.mark.parametrize("norm_type", [7.0, 50.0, 100.0])
def test_orders_whose_powers_leave_the_range(backend: Target, norm_type: float) -> None:
    for scale in (1e-9, 1e-4, 1e4, 1e9):
        params = with_weights(backend, [(3, 4), (5,), (4, 3)])
        params[2].data = params[2].data.t().contiguous().t()  # foreach, whichever backend is named
        for param in params:
            param.data *= scale
            param.grad *= scale
        before = clones(grads_of(params))
        backend.adaptive_clip_grad_(params, 0.05, eps=0.0, norm_type=norm_type)
        assert_adaptive(params, before, 0.05, 0.0, norm_type, f"{scale}")


def test_by_hand(backend: Target) -> None:
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]], device=backend.device))
    weight.grad = torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.03, 0.04]], device=backend.device)
    backend.adaptive_clip_grad_(weight, 0.1, eps=1.0)
    expected = torch.tensor([[0.3, 0.4], [0.06, 0.08], [0.03, 0.04]])
    torch.testing.assert_close(weight.grad.cpu(), expected)


# ---------------------------------------------------------------- special values


def test_unclipped_units_keep_their_bits(backend: Target) -> None:
    params = with_weights(backend, [(4, 30), (9,)])
    with oracle.unchanged(grads_of(params)):
        backend.adaptive_clip_grad_(params, 1e6)
    before = params[0].grad.clone()
    params[0].grad[2] = 1e9
    backend.adaptive_clip_grad_(params, 1e6)
    oracle.assert_same_bits(params[0].grad[[0, 1, 3]], before[[0, 1, 3]])
    assert (params[0].grad[2].abs() < 1e9).all()


def test_a_zero_weight_is_measured_by_eps(backend: Target) -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3, device=backend.device))
    weight.grad = torch.tensor([[1.0, 2.0, 2.0], [1e-7, 0.0, 0.0]], device=backend.device)
    backend.adaptive_clip_grad_(weight, 0.5, eps=0.1)
    torch.testing.assert_close(weight.grad[0].norm().item(), 0.05)
    assert weight.grad[1, 0] == torch.tensor(1e-7)
    backend.adaptive_clip_grad_(weight, 0.5, eps=0.0)
    assert not weight.grad.any()


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_nonfinite_values_stay_in_their_unit(backend: Target, value: float) -> None:
    params = with_weights(backend, [(4, 30), (9,), (2, 2)])
    params[0].grad[1, 7] = value
    params[1].grad[3] = value
    with torch.no_grad():
        params[2][1, 0] = value
    before = clones(grads_of(params))
    backend.adaptive_clip_grad_(params, 0.05)
    assert_adaptive(params, before, 0.05)
    assert params[0].grad[[0, 2, 3]].isfinite().all() and params[2].grad[0].isfinite().all()


# ---------------------------------------------------------------- bookkeeping


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(backend: Target, container: str) -> None:
    params = with_weights(backend, [(4, 30), (9,)])
    before = clones(grads_of(params))
    backend.adaptive_clip_grad_(CONTAINERS[container](params), 0.05)
    count = 1 if container == "single tensor" else 2
    assert_adaptive(params[:count], before[:count], 0.05)


def test_tied_frozen_and_absent(backend: Target) -> None:
    a, b = with_weights(backend, [(4, 30), (9,)])
    before = clones(grads_of([a, b]))
    none = torch.nn.Parameter(torch.ones(2, device=backend.device))
    backend.adaptive_clip_grad_([none, a, b, a, none], 0.05)
    assert_adaptive([a, b], before, 0.05)
    for empty in ([], [none]):
        backend.adaptive_clip_grad_(empty)


def test_shared_memory_is_scaled_once(backend: Target) -> None:
    params = with_weights(backend, [(4, 3), (9,), (4, 3)])
    params[2].grad = params[0].grad
    before = clones(grads_of(params[:2]))
    backend.adaptive_clip_grad_(params, 0.05)
    assert_adaptive(params[:2], before, 0.05)


def test_versions_and_identity(backend: Target) -> None:
    params = with_weights(backend, [(4, 3), (9,), (0,)])
    grads, versions = grads_of(params), [g._version for g in grads_of(params)]
    weights = [p._version for p in params]
    backend.adaptive_clip_grad_(params, 1e6)
    assert all(p.grad is g and g._version > v for p, g, v in zip(params, grads, versions))
    assert weights == [p._version for p in params]


def test_in_inference_mode_and_under_grad(backend: Target) -> None:
    params = with_weights(backend, [(4, 3)])
    before = clones(grads_of(params))
    with torch.enable_grad():
        backend.adaptive_clip_grad_(params, 0.05)
    assert params[0].grad.grad_fn is None
    assert_adaptive(params, before, 0.05)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["clip_factor", "eps"])
@pytest.mark.parametrize("value", [-0.5, NAN, "much"], ids=str)
def test_bad_numbers(backend: Target, name: str, value: object) -> None:
    params = with_weights(backend, [(4, 3), (9,)])
    raises_untouched(
        ValueError, (name, str(value)), params, lambda: backend.adaptive_clip_grad_(params, **{name: value})
    )


def test_bad_gradients(backend: Target) -> None:
    good = with_weights(backend, [(4, 3)])
    expanded = parameter(torch.ones(1, 3, device=backend.device).expand(2, 3))
    sparse = torch.nn.Parameter(torch.ones(3, device=backend.device))
    sparse.grad = torch.ones(3).to_sparse().to(backend.device)
    (other,) = with_weights(backend, [(2, 3)])
    other.data = other.data.t()
    for bad, error, words in (
        (expanded, RuntimeError, ("expanded",)),
        (sparse, TypeError, ("sparse",)),
        (other, RuntimeError, (r"gradient 1 has shape \(2, 3\)", r"weight \(3, 2\)")),
        (3.0, TypeError, ("position 1", "float")),
    ):
        raises_untouched(error, words, good, lambda bad=bad: backend.adaptive_clip_grad_([*good, bad], 0.01))


def test_unknown_backend() -> None:
    params = [parameter(random(3))]
    raises_untouched(
        ValueError,
        ("'fast'", "does not exist"),
        params,
        lambda: gradclip_ext.adaptive_clip_grad_(params, backend="fast"),
    )
