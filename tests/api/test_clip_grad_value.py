"""clip_grad_value_: symmetric clamping."""

from __future__ import annotations

import math
import warnings

import oracle
import pytest
import torch
from cases import CONTAINERS, Target, clones, grads_of, layout_cases, over_real_dtypes
from oracle import parameter
from torch.nn.utils import clip_grad_value_ as torch_clip_grad_value_

import gradclip_ext
from gradclip_ext import reference


@over_real_dtypes
def test_parity_over_layouts_and_containers(backend: Target, dtype: torch.dtype) -> None:
    for clip_value in (0.0, 0.1, 0.7, 3.0, 1e4, math.inf):
        for layout, container, grads in layout_cases(dtype=dtype, device=backend.device):
            params, twins = ([parameter(g) for g in copies] for copies in (grads, clones(grads)))
            before, outside = clones(grads), [oracle.gaps(g) for g in grads]
            what = f"{layout}, {container}, clip_value={clip_value}"
            assert backend.clip_grad_value_(CONTAINERS[container](params), clip_value) is None
            torch_clip_grad_value_(twins, clip_value)
            # Clamping rounds only the bound, once.
            exact = reference.clamp(before, -clip_value, clip_value)
            # Between the bounds -0.0 and 0.0, a GPU's maximum and minimum may return either.
            has_one_zero = clip_value > 0.0 or backend.device == "cpu"
            for grad, twin, old, clamped in zip(grads, twins, outside, exact):
                for expected in (twin.grad.cpu(), clamped.to(dtype)):
                    oracle.assert_within_ulps(grad.cpu(), expected, 0, what)
                    if has_one_zero:
                        oracle.assert_same_bits(grad.cpu(), expected, what)
                oracle.assert_same_bits(oracle.gaps(grad), old, f"{what}: gaps")
            assert all(p.grad is g for p, g in zip(params, grads)), what


@over_real_dtypes
def test_nan_stays_and_infinities_become_the_bound(backend: Target, dtype: torch.dtype) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.25, -0.25, 2.0], dtype=dtype)
    for size in (6, 6 * 3000):  # small and large tensors take different code paths
        param = parameter(special.repeat(size // 6).to(backend.device))
        backend.clip_grad_value_([param, parameter(backend.random(2))], 0.5)
        expected = torch.tensor([math.nan, 0.5, -0.5, 0.25, -0.25, 0.5], dtype=dtype).repeat(size // 6)
        oracle.assert_same_specials(param.grad, expected)
        oracle.assert_within_ulps(param.grad.cpu(), expected, 0)


def test_mixed_dtypes_sizes_and_layouts_in_one_list(backend: Target) -> None:
    grads = [backend.random(40_000), backend.random(3), backend.random(0, 2), backend.random(30_000)[::3]]
    grads += [backend.random(7, dtype=d) for d in (torch.bfloat16, torch.float64, torch.float16)]
    grads += [backend.random(9, 4).t(), backend.random(), backend.random(20_000, dtype=torch.bfloat16)]
    twins = [parameter(g) for g in clones(grads)]
    backend.clip_grad_value_([parameter(g) for g in grads], 0.3)
    for grad, twin in zip(grads, twins):
        oracle.assert_same_bits(grad, twin.grad.clamp_(-0.3, 0.3))


@pytest.mark.parametrize("foreach", [None, True, False])
def test_every_value_of_foreach(foreach: bool | None) -> None:
    params = Target("foreach", "cpu").parameters((5, 3), (7,))
    expected = [g.clamp(-0.2, 0.2) for g in grads_of(params)]
    gradclip_ext.clip_grad_value_(params, 0.2, foreach=foreach)
    for grad, clamped in zip(grads_of(params), expected):
        oracle.assert_same_bits(grad, clamped)


@pytest.mark.parametrize("empty", [[], (), iter([]), {}.values()], ids=lambda e: type(e).__name__)
def test_no_gradients_do_nothing(empty: object) -> None:
    """torch raises a RuntimeError."""
    frozen = torch.nn.Parameter(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradclip_ext.clip_grad_value_(empty, 1.0)
        gradclip_ext.clip_grad_value_([frozen], 1.0)
    assert frozen.grad is None


@pytest.mark.parametrize("half", [0.5, "0.5", torch.tensor(0.5), torch.tensor([0.5])], ids=repr)
def test_clip_value_is_coerced_by_float(half: object) -> None:
    param = parameter(torch.tensor([-2.0, 0.25, 3.0]))
    gradclip_ext.clip_grad_value_(param, half)
    assert param.grad.tolist() == [-0.5, 0.25, 0.5]
