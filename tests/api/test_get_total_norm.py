"""get_total_norm: tensors of any kind, read only."""

from __future__ import annotations

import math
import warnings

import oracle
import pytest
import torch
from cases import CONTAINERS, LAYOUTS, NORM_TYPES, Target, over_dtypes, over_norm_types

import gradclip_ext


@over_norm_types
@over_dtypes
def test_parity_over_layouts_and_containers(backend: Target, dtype: torch.dtype, norm_type: float) -> None:
    for layout, make in LAYOUTS.items():
        tensors = [make(dtype=dtype, device=backend.device), backend.random(6, dtype=dtype)]
        for container, wrap in CONTAINERS.items():
            given = tensors[:1] if container == "single tensor" else tensors
            with oracle.unchanged(given):
                norm = backend.get_total_norm(wrap(given), norm_type)
            oracle.assert_norm(norm, given, norm_type, f"{layout}, {container}")


def test_weights_and_activations(backend: Target) -> None:
    """Any tensors are supported: parameters, and results that are part of a graph."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(backend.device)
    weights = list(model.parameters())
    oracle.assert_norm(backend.get_total_norm(weights), weights, 2.0)
    oracle.assert_norm(backend.get_total_norm(model.parameters(), 1.0), weights, 1.0)
    activation = model(backend.random(5, 4))
    oracle.assert_norm(backend.get_total_norm(activation), [activation.detach()], 2.0)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_expanded_tensors_count_every_element(backend: Target, norm_type: float) -> None:
    for shape, wider in (((1,), (7,)), ((3, 1), (3, 5)), ((), (2, 3))):
        tensors = [backend.random(*shape).expand(*wider), backend.random(4)]
        oracle.assert_norm(backend.get_total_norm(tensors, norm_type), tensors, norm_type)


def test_lazy_conjugates_and_negatives(backend: Target) -> None:
    """What backward gives a complex weight that is used by its conjugate."""
    conjugate = backend.random(3, 5, dtype=torch.complex64).conj()
    assert conjugate.is_conj() and conjugate.imag.is_neg()
    for norm_type in NORM_TYPES:
        for lazy in (conjugate, conjugate.imag):
            tensors = [backend.random(4), lazy]
            oracle.assert_norm(backend.get_total_norm(tensors, norm_type), tensors, norm_type)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_norm_of_zeros_is_positive(backend: Target, norm_type: float) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        for zeros in (torch.zeros(6, dtype=dtype), torch.zeros(6, dtype=dtype)[::2], -torch.zeros(3)):
            norm = backend.get_total_norm([zeros.to(backend.device)], norm_type)
            oracle.assert_same_bits(norm.cpu(), torch.tensor(0.0))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_default_dtype_decides_nothing(backend: Target, norm_type: float, default: torch.dtype) -> None:
    tensors = [backend.random(300), backend.random(2, 3), backend.random(5)[::2]]
    tensors[1].zero_()
    torch.set_default_dtype(default)
    try:
        norm = backend.get_total_norm(tensors, norm_type)
    finally:
        torch.set_default_dtype(torch.float32)
    oracle.assert_same_bits(norm, backend.get_total_norm(tensors, norm_type))


def test_order_zero_counts_beyond_what_half_types_hold(backend: Target) -> None:
    """bfloat16 cannot represent 257: the count is in float32."""
    tensors = [backend.random(1, dtype=torch.bfloat16) for _ in range(300)]
    assert backend.get_total_norm(tensors, 0.0).item() == 300.0


NOTHING = ([], (), {}.values(), iter([]), (t for t in ()))


@pytest.mark.parametrize("empty", NOTHING, ids=lambda e: type(e).__name__)
def test_nothing_gives_a_new_zero(empty: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oracle.assert_same_bits(gradclip_ext.get_total_norm(empty), torch.tensor(0.0))


def test_then_clip_is_clip_grad_norm_(backend: Target) -> None:
    """Norm and clip apart, as pipeline stages need them, give the bits of the whole."""
    for norm_type in (0.5, 1.0, 2.0, math.inf):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            grads = [backend.random(5, 3, dtype=dtype), backend.random(9, dtype=dtype)]
            one, two = ([oracle.parameter(g.clone()) for g in grads] for _ in range(2))
            whole = backend.clip_grad_norm_(one, 0.5, norm_type)
            norm = backend.get_total_norm([p.grad for p in two], norm_type)
            backend.clip_grads_with_norm_(two, 0.5, norm)
            oracle.assert_same_bits(norm, whole)
            for a, b in zip(one, two):
                oracle.assert_same_bits(a.grad, b.grad)
