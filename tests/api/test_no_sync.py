"""The host never waits for a value on an accelerator."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import oracle
import pytest
import torch
from cases import NORM_TYPES, Target, clones, gpu_waits_are_errors, grads_of
from dispatch import NoReads
from oracle import parameter

from gradclip_ext import clip
from gradclip_ext.backends import foreach
from gradclip_ext.thresholds import AdaGC, AutoClip, SpikeDetector, ZClip


@contextmanager
def no_sync(backend: Target) -> Iterator[None]:
    """Fail when the host waits for a value: CUDA reports it; for the blind CPU, every read counts."""
    if backend.sees_values:
        pytest.skip("on the CPU the host may look at values; the blind way and CUDA must not")
    if backend.device == "cpu":
        with contextlib.ExitStack() as stack:
            for module in (clip, foreach):  # otherwise the mode below would itself change what runs
                stack.enter_context(mock.patch.object(module, "is_intercepted", lambda: False))
            stack.enter_context(NoReads())
            yield
        return
    with gpu_waits_are_errors():
        yield


def mixed(backend: Target) -> list[torch.Tensor]:
    params = backend.parameters((7, 5), (), (0,), (300,))
    params += backend.parameters((4, 4), dtype=torch.bfloat16)
    params += backend.parameters((3,), dtype=torch.complex64)
    params.append(parameter(backend.random(8, 6)[::2, 1::2]))
    for param in params:
        param.data.fill_(1.0)
    return params


def test_clipping_by_norm(backend: Target) -> None:
    for norm_type in NORM_TYPES:
        for max_norm in (0.1, 1e6, math.inf):
            params = mixed(backend)
            before = clones(grads_of(params))
            with no_sync(backend):
                norm = backend.clip_grad_norm_(params, max_norm, norm_type)
            oracle.assert_norm(norm, before, norm_type)
            oracle.assert_scaled(grads_of(params), before, norm, max_norm)


def test_everything_else(backend: Target) -> None:
    params = [p for p in mixed(backend) if not p.is_complex()]
    norm = torch.tensor(5.0).to(backend.device)
    with no_sync(backend):
        backend.get_total_norm(grads_of(params))
        backend.clip_grads_with_norm_(params, 1.0, norm)
        backend.clip_grad_value_(params, 0.1)
        backend.clamp_grad_(params, -0.05, 0.02)
        backend.clip_grad_norm_([*params, params[0]], 1.0)  # duplicates and overlap too
        backend.clip_grad_norm_([*params, parameter(params[0].grad[1:4])], 1.0)


def test_what_the_device_decides(backend: Target) -> None:
    """A limit that is a function or a tensor, norms for each parameter, zeros where a norm is not finite."""
    params = mixed(backend)
    norms = torch.tensor([2.0, math.nan] * 5)[: len(params)].to(backend.device)
    with no_sync(backend):
        backend.clip_grad_norm_(params, lambda norm: norm / 2)
        backend.clip_grad_norm_([*params, torch.nn.Parameter(torch.ones(2))], 1.0, zero_if_nonfinite=True)
        backend.clip_grads_with_norm_(params, 1.0, norms, zero_if_nonfinite=True)
        backend.clip_grad_norm_(params, 1.0, per_tensor=True, zero_if_nonfinite=True)
        backend.clip_grad_norm_([*params, params[0]], lambda norms: norms / 2, per_tensor=True)
        backend.get_grad_stats([*params, torch.nn.Parameter(torch.ones(2))])
        backend.get_grad_stats(params, 3.0)
        backend.adaptive_clip_grad_(params)
    assert not params[1].grad.any()
    if backend.device != "cpu":  # on the CPU the host looks at the tensor
        with no_sync(backend):
            backend.clip_grad_norm_(params, norms[0])
            backend.clip_grads_with_norm_(params, norms, norms[0])
            backend.clip_grad_norm_([*params, torch.nn.Parameter(torch.ones(2))], norms[:1], per_tensor=True)


def test_thresholds(backend: Target) -> None:
    params = mixed(backend)
    rules = [rule.to(backend.device) for rule in (ZClip(), AutoClip())]
    each, detector = AdaGC(params).to(backend.device), SpikeDetector().to(backend.device)
    with no_sync(backend):
        for rule in rules:
            detector(backend.clip_grad_norm_(params, rule))
        backend.clip_grad_norm_(params, each, per_tensor=True)


def test_error_if_nonfinite_is_the_one_exception(backend: Target) -> None:
    params = mixed(backend)
    with pytest.raises((AssertionError, RuntimeError)), no_sync(backend):
        backend.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
