"""A few calls that reach every CUDA kernel, short enough for compute-sanitizer (`make sanitize-gpu`)."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import REAL_DTYPES, clones, grads_of, over_real_dtypes
from oracle import parameter

import gradclip_ext
from gradclip_ext import backends

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
