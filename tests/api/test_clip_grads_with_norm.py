"""clip_grads_with_norm_: scaling by a norm from elsewhere."""

from __future__ import annotations

import math
from contextlib import nullcontext

import oracle
import pytest
import torch
from cases import CONTAINERS, Target, clones, grads_of, layout_cases, over_dtypes, random
from dispatch import RecordDispatch
from oracle import parameter

import gradclip_ext


def on_cpu(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return copies on the CPU, where torch multiplies by the float32 coefficient. On a GPU it first rounds
    that to the gradient's dtype."""
    return [tensor.cpu().clone() for tensor in tensors]


@over_dtypes
def test_parity_over_layouts_and_containers(backend: Target, dtype: torch.dtype) -> None:
    for max_norm in (0.0, 0.3, 50.0):
        for layout, container, grads in layout_cases(dtype=dtype, device=backend.device):
            norm = random(dtype=torch.float64 if dtype == torch.float64 else torch.float32).abs()
            norm = norm.to(backend.device)
            params, twins = ([parameter(g) for g in copies] for copies in (grads, on_cpu(grads)))
            before, outside = clones(grads), [oracle.gaps(g) for g in grads]
            what = f"{layout}, {container}, max_norm={max_norm}"
            assert backend.clip_grads_with_norm_(CONTAINERS[container](params), max_norm, norm) is None
            torch.nn.utils.clip_grads_with_norm_(twins, max_norm, norm.cpu())
            oracle.assert_scaled(grads, before, norm, max_norm, what)
            for grad, twin, old in zip(grads, twins, outside):
                oracle.assert_within_ulps(grad.cpu(), twin.grad, 1, what)
                oracle.assert_same_bits(oracle.gaps(grad), old, f"{what}: gaps")


@over_dtypes
def test_same_bits_as_torch(backend: Target, dtype: torch.dtype) -> None:
    """Given the same norm there is one coefficient, in torch's order, and one rounding of the product."""
    for _ in range(50):
        norm = random(dtype=torch.float64 if dtype == torch.float64 else torch.float32).abs()
        grads = [backend.random(21, dtype=dtype), backend.random(3, 5, dtype=dtype)]
        twins = [parameter(g) for g in on_cpu(grads)]
        backend.clip_grads_with_norm_([parameter(g) for g in grads], 0.7, norm.to(backend.device))
        torch.nn.utils.clip_grads_with_norm_(twins, 0.7, norm)
        for grad, twin in zip(grads, twins):
            oracle.assert_same_bits(grad.cpu(), twin.grad)


NORM_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


@pytest.mark.parametrize("norm_dtype", NORM_DTYPES, ids=str)
@over_dtypes
def test_norm_of_any_dtype(backend: Target, dtype: torch.dtype, norm_dtype: torch.dtype) -> None:
    """A half norm is upcast first: 1 / bfloat16 would cost the gradients their digits."""
    params = backend.parameters((30,), (4, 5), dtype=dtype)
    before = clones(grads_of(params))
    norm = backend.random(dtype=norm_dtype).abs() + 3
    backend.clip_grads_with_norm_(params, 0.5, norm)
    used = norm if norm_dtype in (torch.float32, torch.float64) else norm.float()
    oracle.assert_scaled(grads_of(params), before, used, 0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_special_norms_act_as_in_torch(backend: Target, value: float) -> None:
    ours = backend.parameters((4,), (2, 2))
    theirs = [parameter(g.clone()) for g in grads_of(ours)]
    norm = torch.tensor(value, device=backend.device)
    backend.clip_grads_with_norm_(ours, 1.0, norm)
    torch.nn.utils.clip_grads_with_norm_(theirs, 1.0, norm)
    for one, other in zip(ours, theirs):
        oracle.assert_same_specials(one.grad, other.grad)
        oracle.assert_within_ulps(one.grad.cpu(), other.grad.cpu(), 0)


@pytest.mark.parametrize("zero_if_nonfinite", [False, True])
def test_negative_norm_that_the_host_cannot_see(backend: Target, zero_if_nonfinite: bool) -> None:
    """It acts as 0: nothing is clipped, no sign flipped and nothing set to 0."""
    params = backend.parameters((30,), (4, 5))
    before = clones(grads_of(params))
    for norm in (torch.tensor(-1.0), torch.tensor([-1.0, -7.0])):
        with RecordDispatch() if backend.device == "cpu" else nullcontext():
            backend.clip_grads_with_norm_(
                params, 1.0, norm.to(backend.device), zero_if_nonfinite=zero_if_nonfinite
            )
        for grad, old in zip(grads_of(params), before):
            oracle.assert_same_bits(grad, old)


def test_norm_is_left_alone(backend: Target) -> None:
    norm = torch.tensor(5.0, device=backend.device, requires_grad=True)
    with oracle.unchanged([norm]):
        backend.clip_grads_with_norm_(backend.parameters((4,)), 1.0, norm)
        backend.clip_grads_with_norm_(backend.parameters((4,)), 1e9, norm)
    assert norm.requires_grad


def test_norm_that_is_one_of_the_gradients(backend: Target) -> None:
    """If the norm shares memory with a gradient, the first product must not change the coefficient."""
    norm, other = (backend.random().abs() + 2 for _ in range(2))
    before = clones([norm, other])
    backend.clip_grads_with_norm_([parameter(norm), parameter(other)], 0.5, norm)
    oracle.assert_scaled([norm, other], before, before[0], 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device: no CUDA here")
@pytest.mark.parametrize("devices", [("cpu", "cuda"), ("cuda", "cpu")])
def test_norm_on_another_device(devices: tuple[str, str]) -> None:
    params = [parameter(random(9, device=devices[0]))]
    before = clones(grads_of(params))
    norm = torch.tensor(5.0, device=devices[1])
    gradclip_ext.clip_grads_with_norm_(params, 0.5, norm)
    oracle.assert_scaled(grads_of(params), before, norm, 0.5)


def test_nothing_to_clip() -> None:
    for empty in ([], (), [torch.nn.Parameter(torch.ones(2))]):
        assert gradclip_ext.clip_grads_with_norm_(empty, 1.0, torch.tensor(2.0)) is None


@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_norm_with_one_element_is_a_norm(foreach: bool | None, shape: tuple[int, ...]) -> None:
    """TransformerEngine and Megatron return such norms; torch supports them with foreach=False only."""
    value = random().abs() + 2
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        grads = [random(5, dtype=dtype), random(2, 3, dtype=dtype)]
        before = clones(grads)
        norm = value.reshape(shape)
        gradclip_ext.clip_grads_with_norm_([parameter(g) for g in grads], 0.5, norm, foreach)
        oracle.assert_scaled(grads, before, value, 0.5)
        assert norm.shape == shape
