"""The choice of a backend, and the same operations in all of them."""

from __future__ import annotations

import inspect
import math

import oracle
import pytest
import torch
from cases import clones, grads_of, parameters, random
from oracle import parameter

import gradclip_ext
from gradclip_ext import backends
from gradclip_ext.backends import base

OPERATIONS = ("why_unavailable", "norm", "scale_", "clip_each_", "statistics", "clip_adaptive_", "clamp_")


@pytest.mark.parametrize("name", list(backends.ALL))
def test_every_backend_has_the_declared_operations(name: str) -> None:
    backend = backends.ALL[name]
    assert backend.name == name
    for operation in OPERATIONS:
        declared = list(inspect.signature(getattr(base.Backend, operation)).parameters)[1:]
        offered = list(inspect.signature(getattr(backend, operation)).parameters)
        assert offered == declared, f"{name}.{operation}"
    public = {v for v in vars(base.Backend) if not v.startswith("_")} - {"name"}
    assert set(OPERATIONS) == public


@pytest.mark.parametrize("name", list(backends.ALL))
def test_why_unavailable_gives_a_reason_or_none(name: str) -> None:
    for device_type in ("cpu", "cuda", "meta"):
        reason = backends.ALL[name].why_unavailable(torch.device(device_type))
        assert reason is None or (isinstance(reason, str) and len(reason) > 10), (name, device_type, reason)


def test_foreach_is_always_available() -> None:
    assert backends.ALL["foreach"].why_unavailable(torch.device("cpu")) is None
    assert list(backends.ALL)[-1] == "foreach", "the fallback comes last in the order of preference"


def test_automatic_choice_on_the_cpu() -> None:
    params = parameters((5,), (3, 2))
    before = clones(grads_of(params))
    norm = gradclip_ext.clip_grad_norm_(params, 0.5)
    oracle.assert_norm(norm, before, 2.0)
    oracle.assert_scaled(grads_of(params), before, norm, 0.5)


# ---------------------------------------------------------------- GRADCLIP_EXT_BACKEND


def test_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCLIP_EXT_BACKEND", "foreach")
    params = parameters((5,))
    assert gradclip_ext.clip_grad_norm_(params, 1.0) > 0


def test_unknown_backend_in_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCLIP_EXT_BACKEND", "nonsense")
    params = parameters((5,), (2,))
    for call in (
        lambda: gradclip_ext.clip_grad_norm_(params, 0.1),
        lambda: gradclip_ext.clip_grads_with_norm_(params, 0.1, torch.tensor(5.0)),
        lambda: gradclip_ext.clip_grad_value_(params, 0.1),
        lambda: gradclip_ext.clamp_grad_(params, -0.1, 0.1),
        lambda: gradclip_ext.get_total_norm(grads_of(params)),
    ):
        with oracle.unchanged(grads_of(params)), pytest.raises(ValueError, match="nonsense") as caught:
            call()
        assert "GRADCLIP_EXT_BACKEND" in str(caught.value) and "foreach" in str(caught.value)


def test_argument_overrules_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCLIP_EXT_BACKEND", "nonsense")
    params = parameters((5,))
    assert gradclip_ext.clip_grad_norm_(params, 1.0, backend="foreach") > 0


def test_empty_environment_variable_names_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCLIP_EXT_BACKEND", "")
    assert gradclip_ext.clip_grad_norm_(parameters((5,)), 1.0) > 0


@pytest.mark.parametrize("name", list(backends.ALL))
def test_naming_an_unavailable_backend_says_why(name: str) -> None:
    reasons = {d: backends.ALL[name].why_unavailable(torch.device(d)) for d in ("cpu", "meta")}
    for device, reason in reasons.items():
        if reason is None:
            continue
        param = torch.nn.Parameter(torch.empty(3, device=device))
        param.grad = torch.empty(3, device=device)
        with pytest.raises(RuntimeError) as caught:
            gradclip_ext.clip_grad_norm_(param, 1.0, backend=name)
        assert name in str(caught.value) and reason in str(caught.value)


# ---------------------------------------------------------------- irregular gradients on any backend


def test_irregular_gradients_work_whichever_backend_is_named() -> None:
    """Gaps and complex numbers have no fused kernel; naming a backend does not make them an error."""
    for name, backend in backends.ALL.items():
        if backend.why_unavailable(torch.device("cpu")) is not None:
            continue
        grads = [random(6, 4)[::2], random(5, dtype=torch.complex64), random(7), random(3, 4).t()]
        before = clones(grads)
        norm = gradclip_ext.clip_grad_norm_([parameter(g) for g in grads], 0.5, backend=name)
        oracle.assert_norm(norm, before, 2.0, name)
        oracle.assert_scaled(grads, before, norm, 0.5, name)


def test_device_of_meta_tensors_needs_no_values() -> None:
    """Tensors without values give results with the right shapes and dtypes, as from torch."""
    params = []
    for shape in ((3,), (2, 2), (0,)):
        params.append(torch.nn.Parameter(torch.empty(*shape, device="meta")))
        params[-1].grad = torch.empty(*shape, device="meta")
    for norm_type in (0.0, 0.5, 1.0, 2.0, math.inf):
        norm = gradclip_ext.clip_grad_norm_(params, 1.0, norm_type)
        assert norm.device.type == "meta" and norm.shape == () and norm.dtype == torch.float32
    gradclip_ext.clip_grad_value_(params, 1.0)
    gradclip_ext.clamp_grad_(params, 0.0)
