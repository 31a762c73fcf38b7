"""clamp_grad_: bounds that need not be symmetric."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import CONTAINERS, Target, clones, grads_of, layout_cases, over_real_dtypes
from oracle import parameter

import gradclip_ext

BOUNDS = [(-0.1, 0.7), (None, 0.5), (-0.5, None), (0.2, 1.0), (-2.0, -0.3), (0.4, 0.4), (-math.inf, 0.1)]


@over_real_dtypes
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_equals_clamp_(backend: Target, bounds: tuple, dtype: torch.dtype) -> None:
    for layout, container, grads in layout_cases(dtype=dtype, device=backend.device):
        params = [parameter(g) for g in grads]
        expected, outside = [g.clone().clamp_(*bounds) for g in grads], [oracle.gaps(g) for g in grads]
        what = f"{layout}, {container}, {bounds}"
        assert backend.clamp_grad_(CONTAINERS[container](params), *bounds) is None
        for param, grad, clamped, old in zip(params, grads, expected, outside):
            assert param.grad is grad, what
            oracle.assert_same_bits(grad, clamped, what)
            oracle.assert_same_bits(oracle.gaps(grad), old, f"{what}: gaps")


@over_real_dtypes
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_special_values(backend: Target, bounds: tuple, dtype: torch.dtype) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 5.0, -5.0], dtype=dtype)
    for repeats in (1, 3000):  # small and large tensors take different code paths
        grads = [special.repeat(repeats).to(backend.device) for _ in range(2)]
        expected = special.repeat(repeats).clamp(*bounds)
        backend.clamp_grad_([parameter(g) for g in grads], *bounds)
        for grad in grads:
            oracle.assert_same_specials(grad, expected)
            oracle.assert_within_ulps(grad.cpu(), expected, 0)


def test_bounds_by_name_and_coerced() -> None:
    for low, high in ((-1, 2), ("-1", "2"), (torch.tensor(-1), torch.tensor([2.0]))):
        param = parameter(torch.tensor([-3.0, 0.5, 3.0]))
        gradclip_ext.clamp_grad_(param, max=high, min=low)
        assert param.grad.tolist() == [-1.0, 0.5, 2.0]


def test_inside_the_bounds_nothing_changes(backend: Target) -> None:
    params = backend.parameters((30,), (4, 5), (40_000,))
    with oracle.unchanged(grads_of(params)):
        backend.clamp_grad_(params, -1e3, 1e3)
        backend.clamp_grad_(params, -math.inf, math.inf)


def test_symmetric_bounds_are_clip_grad_value_(backend: Target) -> None:
    one = backend.parameters((30,), (4, 5))
    two = [parameter(g) for g in clones(grads_of(one))]
    backend.clamp_grad_(one, -0.25, 0.25)
    backend.clip_grad_value_(two, 0.25)
    for a, b in zip(one, two):
        oracle.assert_same_bits(a.grad, b.grad)


def test_no_gradients_do_nothing() -> None:
    frozen = torch.nn.Parameter(torch.ones(2))
    for empty in ([], (), [frozen], frozen):
        gradclip_ext.clamp_grad_(empty, -1.0, 1.0)
    assert frozen.grad is None
