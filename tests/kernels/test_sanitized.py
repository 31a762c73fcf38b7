"""A few calls that reach every CUDA kernel, short enough for compute-sanitizer (`make sanitize-gpu`)."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import REAL_DTYPES, clones, grads_of, over_real_dtypes
from oracle import parameter

import gradclip_ext
from gradclip_ext import backends, reference

WHY_NOT = backends.ALL["cuda"].why_unavailable(torch.device("cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"cuda cannot handle a GPU here: {WHY_NOT}"),
]
SHAPES = ((70_001,), (0,), (33,), (129, 65), ())


@over_real_dtypes
@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, math.inf])
def test_clipping(dtype: torch.dtype, p: float) -> None:
    whole = [torch.randn(s, device="cuda").to(dtype) for s in SHAPES]
    params = [parameter(t) for t in whole] + [parameter(whole[0].clone()[1:])]  # the last one misaligned
    before = clones(grads_of(params))
    norm = gradclip_ext.clip_grad_norm_(params, 0.5, p, backend="cuda")
    oracle.assert_norm(norm, before, p)
    oracle.assert_scaled(grads_of(params), before, norm, 0.5)
    gradclip_ext.clip_grad_value_(params, 1e-3, backend="cuda")


def test_a_long_mixed_list() -> None:
    params = [
        parameter(torch.randn(1 + i % 7, device="cuda").to(REAL_DTYPES[i % len(REAL_DTYPES)]))
        for i in range(2_000)
    ]
    before = clones(grads_of(params))
    norm = gradclip_ext.clip_grad_norm_(params, 0.5, backend="cuda")
    oracle.assert_norm(norm, before, 2.0)


def test_values_out_of_the_range_of_float32_squares() -> None:
    for scale in (1e30, 1e-30):
        params = [parameter(torch.randn(50_000, device="cuda") * scale)]
        before = clones(grads_of(params))
        norm = gradclip_ext.clip_grad_norm_(params, math.inf, backend="cuda")
        oracle.assert_norm(norm, before, 2.0)


@over_real_dtypes
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 3.0])
def test_results_for_each_tensor(dtype: torch.dtype, p: float) -> None:
    params = [parameter(torch.randn(s, device="cuda").to(dtype)) for s in SHAPES]
    params.append(parameter(params[0].grad.clone()[1:]))  # misaligned
    before = clones(grads_of(params))
    stats = gradclip_ext.get_grad_stats(params, p, backend="cuda")
    norms = gradclip_ext.clip_grad_norm_(params, 0.5, p, per_tensor=True, backend="cuda")
    torch.testing.assert_close(stats.norms.to(norms.dtype), norms, rtol=1e-6, atol=0.0)
    for param, old, norm in zip(params, before, norms):
        oracle.assert_norm(norm, [old], p)
        oracle.assert_scaled([param.grad], [old], norm, 0.5)


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_adaptive_clipping(p: float) -> None:
    """Units for a warp, for a block, and for all blocks."""
    for shape in ((129, 65), (3, 20_001), (2, 100_000), (300_001,)):
        weight = torch.nn.Parameter(torch.randn(shape, device="cuda"))
        weight.grad = torch.randn(shape, device="cuda")
        (expected,) = reference.adaptive_clip([weight.grad.clone()], [weight.detach()], 0.05, 1e-3, p)
        gradclip_ext.adaptive_clip_grad_([weight], 0.05, 1e-3, p, backend="cuda")
        torch.testing.assert_close(weight.grad.cpu().double(), expected.double(), rtol=2e-6, atol=0.0)
