"""clip_grad_norm_: parity with torch and the oracle, the coefficient, the threshold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import oracle
import pytest
import torch
from cases import (
    CONTAINERS,
    Target,
    clones,
    grads_of,
    layout_cases,
    over_dtypes,
    over_norm_types,
    over_real_dtypes,
    parameters,
    random,
)
from oracle import parameter

import gradclip_ext
from gradclip_ext import reference


def check(
    backend: Target, params: list, arg: object, max_norm: float, norm_type: float, *, what: str = ""
) -> None:
    """Clip once and compare everything: norm, gradients, gaps, identity."""
    grads = grads_of(params)
    before, outside = clones(grads), [oracle.gaps(g) for g in grads]
    norm = backend.clip_grad_norm_(arg, max_norm, norm_type)
    oracle.assert_norm(norm, before, norm_type, what)
    oracle.assert_scaled(grads, before, norm, max_norm, what)
    oracle.assert_clipped_like_torch(grads, before, max_norm, norm_type, what=what)
    for param, grad, old in zip(params, grads, outside):
        assert param.grad is grad, f"{what}: p.grad was replaced"
        oracle.assert_same_bits(oracle.gaps(grad), old, f"{what}: gaps")


@over_norm_types
@over_dtypes
def test_parity_over_layouts_and_containers(backend: Target, dtype: torch.dtype, norm_type: float) -> None:
    for threshold in (lambda norm: norm / 2, lambda norm: 2 * norm + 1):  # clipped, and not clipped
        for layout, container, grads in layout_cases(dtype=dtype, device=backend.device):
            params = [parameter(g) for g in grads]
            max_norm = threshold(reference.total_norm(grads, norm_type))
            what = f"{layout}, {container}, max_norm={max_norm}"
            check(backend, params, CONTAINERS[container](params), max_norm, norm_type, what=what)


@pytest.mark.parametrize("wrap", [tuple, iter, reversed, set, dict.fromkeys])
def test_any_iterable(wrap: Callable) -> None:
    params = parameters((5, 3), (7,))
    before = clones(grads_of(params))
    norm = gradclip_ext.clip_grad_norm_(wrap(params), 1.0)
    oracle.assert_norm(norm, before, 2.0)
    oracle.assert_scaled(grads_of(params), before, norm, 1.0)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_every_value_of_foreach(foreach: bool | None) -> None:
    grads = [random(5, 3), random(7)]
    params = [parameter(g.clone()) for g in grads]
    norm = gradclip_ext.clip_grad_norm_(params, 1.0, foreach=foreach)
    oracle.assert_norm(norm, grads, 2.0)
    oracle.assert_scaled(grads_of(params), grads, norm, 1.0)


@pytest.mark.parametrize("norm_type", [-1.0, -2.5, 0.25, 1.5, 7.0, 40.0])
def test_any_order(backend: Target, norm_type: float) -> None:
    check(backend, params := backend.parameters((5, 3), (11,), ()), params, 0.5, norm_type)


def test_order_nan_makes_everything_nan(backend: Target) -> None:
    params = backend.parameters((3,), (2, 2))
    assert math.isnan(backend.clip_grad_norm_(params, 1.0, math.nan))
    assert all(g.isnan().all() for g in grads_of(params))


def test_order_zero_counts_tensors_with_a_nonzero_element(backend: Target) -> None:
    params = backend.parameters((4,), (3,), (2,), (0,))
    params[1].grad.zero_()
    params[2].grad[0] = 0.0
    assert backend.clip_grad_norm_(params, 9.0, 0.0).item() == 2.0


def test_every_element_of_a_long_list_counts_once(backend: Target) -> None:
    """Lists that span several launches, empty tensors anywhere in them (pytorch#140066)."""
    shapes = [(0,) if i % 7 == 3 else (1 + i % 97,) for i in range(1500)] + [(0, 4)]
    for dtype, norm_type in ((torch.float32, 2.0), (torch.bfloat16, math.inf)):
        params = backend.parameters(*shapes, dtype=dtype)
        grads = grads_of(params)
        before = clones(grads)
        norm = backend.clip_grad_norm_(params, 3.0, norm_type)
        oracle.assert_norm(norm, before, norm_type)
        oracle.assert_scaled(grads, before, norm, 3.0)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_zero_size_gradient_is_ignored_wherever_it_stands(backend: Target, where: int) -> None:
    """torch raises for inf, -inf and negative orders, and the other ranks then wait forever."""
    for norm_type in (0.0, 0.5, 2.0, math.inf, -math.inf, -1.0):
        params = backend.parameters((3,), (2, 2))
        params.insert(where, parameter(backend.random(0, 5)))
        check(backend, params, params, 0.1, norm_type, what=f"{norm_type}")


def test_zero_size_gradient_may_be_expanded(backend: Target) -> None:
    """A stride of 0 is harmless where there is no element; a view with gaps beside it changes nothing."""
    params = [parameter(backend.random(0, 1).expand(0, 3)), parameter(backend.random(6, 4)[:, 1:3])]
    check(backend, params, params, 0.5, 2.0)
    check(backend, params[:1], params[:1], 0.5, 2.0)
    backend.clip_grad_value_(params, 0.1)


def test_only_zero_size_gradients(backend: Target) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for norm_type in (0.0, 2.0, math.inf, -math.inf, -2.0):
            params = backend.parameters((0,), (3, 0), dtype=dtype)
            norm = backend.clip_grad_norm_(params, 1.0, norm_type)
            oracle.assert_norm(norm, grads_of(params), norm_type, f"{dtype} {norm_type}")
            assert norm.item() == 0.0


# ---------------------------------------------------------------- lists of mixed kinds


def test_mixed_dtypes_in_one_list(backend: Target) -> None:
    halves = [torch.bfloat16, torch.float32, torch.float16, torch.complex64]
    for dtypes in (halves, [*halves, torch.float64], [torch.bfloat16, torch.complex128], halves[::-1]):
        for norm_type in (0.5, 1.0, 2.0, 3.0, math.inf):
            params = [parameter(backend.random(6, 5, dtype=d)) for d in dtypes * 2]
            check(backend, params, params, 0.7, norm_type, what=f"{dtypes} {norm_type}")


def test_dtype_of_the_gradient_counts_not_of_the_parameter(backend: Target) -> None:
    params = backend.parameters((5,), (4, 2))
    for param in params:
        param.data = param.data.bfloat16()
    assert [g.dtype for g in grads_of(params)] == [torch.float32] * 2
    check(backend, params, params, 0.5, 2.0)


def test_mixed_layouts_in_one_list(backend: Target) -> None:
    grads = [g for _, container, g in layout_cases(device=backend.device) if container == "list"]
    params = [parameter(g) for group in grads for g in group]
    check(backend, params, params, 1.0, 2.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device: no CUDA here")
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_mixed_devices_in_one_list(devices: tuple[str, str]) -> None:
    grads = [random(50, device=d) for d in devices * 2]
    params = [parameter(g.clone()) for g in grads]
    norm = gradclip_ext.clip_grad_norm_(params, 1.0)
    assert norm.device.type == devices[0]
    oracle.assert_norm(norm, grads, 2.0)
    oracle.assert_scaled(grads_of(params), grads, norm, 1.0)


# ---------------------------------------------------------------- nothing to clip


@pytest.mark.parametrize("error_if_nonfinite", [False, True])
@pytest.mark.parametrize("empty", [[], (), iter([]), {}.values()], ids=lambda e: type(e).__name__)
def test_nothing_to_clip_gives_a_new_zero_silently(empty: object, error_if_nonfinite: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norms = [gradclip_ext.clip_grad_norm_(empty, 1.0, 2.0, error_if_nonfinite) for _ in range(2)]
    for norm in norms:
        oracle.assert_same_bits(norm, torch.tensor(0.0))
    assert norms[0].data_ptr() != norms[1].data_ptr()


@pytest.mark.parametrize("foreach", [None, False])
def test_torchs_defaults_decide_on_the_norm_of_nothing(foreach: bool | None) -> None:
    frozen = torch.nn.Parameter(torch.ones(2))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            for ours, theirs, nothing in (
                (gradclip_ext.clip_grad_norm_, torch.nn.utils.clip_grad_norm_, ([frozen], 1.0)),
                (gradclip_ext.get_total_norm, torch.nn.utils.get_total_norm, ([],)),
            ):
                norm, expected = ours(*nothing, foreach=foreach), theirs(*nothing, foreach=foreach)
                assert (norm.dtype, norm.device) == (expected.dtype, expected.device)
    finally:
        torch.set_default_dtype(torch.float32)


def test_parameters_without_gradient_are_skipped(backend: Target) -> None:
    params = backend.parameters((3,), (4,))
    frozen = torch.nn.Parameter(torch.ones(2))
    check(backend, params, [frozen, params[0], frozen, params[1]], 0.5, 2.0)
    assert frozen.grad is None
    oracle.assert_same_bits(backend.clip_grad_norm_([frozen], 1.0), torch.tensor(0.0))


@pytest.mark.parametrize("bad", [{"max_norm": "x"}, {"max_norm": -1.0}, {"max_norm": 1.0, "norm_type": "x"}])
def test_arguments_are_parsed_even_with_nothing_to_clip(bad: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        gradclip_ext.clip_grad_norm_([], **bad)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize("one", [1, True, 1.0, "1", "1.0", torch.tensor(1), torch.tensor([1.0])], ids=repr)
def test_max_norm_is_coerced_by_float(one: object) -> None:
    grad = random(9)
    (plain, other) = (parameter(grad.clone()) for _ in range(2))
    norms = gradclip_ext.clip_grad_norm_(plain, 1.0), gradclip_ext.clip_grad_norm_(other, one)
    oracle.assert_same_bits(norms[1], norms[0])
    oracle.assert_same_bits(other.grad, plain.grad)


def test_a_threshold_that_requires_grad_does_not_warn() -> None:
    threshold = torch.tensor(0.5, requires_grad=True)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradclip_ext.clip_grad_norm_(parameter(random(9)), threshold)
            gradclip_ext.clip_grad_value_(parameter(random(9)), threshold)
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("text, order", [("inf", math.inf), ("2", 2.0), ("-inf", -math.inf), ("0.5", 0.5)])
def test_norm_type_may_be_text(text: str, order: float) -> None:
    params = [parameter(random(9))]
    assert gradclip_ext.get_total_norm(grads_of(params), text) == gradclip_ext.clip_grad_norm_(
        params, 1, order
    )


# ---------------------------------------------------------------- coefficient and threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_coefficient_is_torchs_to_the_last_bit(backend: Target, dtype: torch.dtype) -> None:
    """Reciprocal, then product: a true division differs by an ulp in a quarter of inputs."""
    divided = 0
    for _ in range(200):
        norm_in, max_norm = (random(dtype=dtype).abs() for _ in range(2))
        grad = torch.zeros(3, dtype=dtype)
        grad[1] = norm_in  # one element: no rounding in the norm of order inf
        param = parameter(grad.to(backend.device))
        norm = backend.clip_grad_norm_(param, max_norm.item(), math.inf)
        assert norm.item() == norm_in.item()
        coef = torch.clamp((norm_in + 1e-6).reciprocal() * max_norm.item(), max=1.0)
        oracle.assert_same_bits(param.grad[1].cpu(), norm_in * coef)
        # A Python number on the left would itself become reciprocal and product.
        divided += bool(coef < 1 and coef != max_norm / (norm_in + 1e-6))
    assert divided, "no input told the two orders apart: this test shows nothing"


@over_real_dtypes
def test_small_gradients_are_never_amplified(backend: Target, dtype: torch.dtype) -> None:
    grads = [backend.random(20, dtype=dtype).mul_(0.01), backend.random(3, dtype=dtype).mul_(0.01)]
    params = [parameter(g) for g in grads]
    with oracle.unchanged(grads):
        for max_norm in (10.0, 1e6, 1e30, 1e39, 1e300, math.inf):
            backend.clip_grad_norm_(params, max_norm)


def test_norm_equal_to_max_norm_still_scales(backend: Target) -> None:
    """The 1e-6 in the denominator: 1 / (1 + 1e-6)."""
    param = parameter(torch.ones(1, device=backend.device))
    backend.clip_grad_norm_(param, 1.0)
    assert param.grad.item() == pytest.approx(1 - 1e-6, abs=1e-7) and param.grad.item() < 1


def test_unchanged_below_the_threshold_by_two_ulp(backend: Target) -> None:
    """The coefficient is exactly 1 when norm <= max_norm (1 - 2e-7) - 1e-6."""
    for _ in range(100):
        max_norm = random().abs().item() + 1e-3
        grad = torch.tensor([max_norm * (1 - 2e-7) - 1e-6], device=backend.device)
        if grad.item() > max_norm * (1 - 2e-7) - 1e-6:  # rounded up on the way to float32
            continue
        with oracle.unchanged([grad], f"max_norm={max_norm!r}"):
            backend.clip_grad_norm_(parameter(grad), max_norm, math.inf)


@over_dtypes
def test_max_norm_zero_gives_zeros(backend: Target, dtype: torch.dtype) -> None:
    params = backend.parameters((3,), (2, 2), dtype=dtype)
    assert backend.clip_grad_norm_(params, 0.0) > 0
    assert not any(g.any() for g in grads_of(params))


@over_dtypes
def test_max_norm_inf_only_reports(backend: Target, dtype: torch.dtype) -> None:
    params = backend.parameters((3,), (2, 2), dtype=dtype)
    with oracle.unchanged(grads_of(params)):
        norm = backend.clip_grad_norm_(params, math.inf)
    oracle.assert_norm(norm, grads_of(params), 2.0)


def test_zero_gradients_are_fine(backend: Target) -> None:
    params = [parameter(torch.zeros(4, device=backend.device)) for _ in range(2)]
    with oracle.unchanged(grads_of(params)):
        assert backend.clip_grad_norm_(params, 1.0).item() == 0.0


def test_threshold_beyond_float32(backend: Target) -> None:
    """A max_norm beyond float32 clips only infinite gradients, which become NaN, as in torch."""
    param = parameter(torch.tensor([1.0, math.inf], device=backend.device))
    assert backend.clip_grad_norm_(param, 1e39) == math.inf
    assert param.grad[1].isnan()


def test_docstring_says_first_that_the_norm_is_from_before() -> None:
    assert "before" in gradclip_ext.clip_grad_norm_.__doc__.splitlines()[0]
