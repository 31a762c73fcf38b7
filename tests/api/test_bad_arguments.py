"""Numbers, backends and foreach= that raise: the exception, its message, and unchanged gradients."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from cases import Target, grads_of, parameters, raises_untouched

import gradclip_ext
from gradclip_ext import backends, register_clamp_hook

# ---------------------------------------------------------------- numbers


BAD_NUMBERS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "text": ("much", ValueError, ("'much'", "number")),
    "None": (None, TypeError, ("None", "number")),
    "list": ([1.0], TypeError, (r"\[1\.0\]", "number")),
    "three elements": (torch.ones(3), ValueError, (r"shape \(3,\)", "number")),
    "complex": (1j, TypeError, ("1j", "number")),
    "huge int": (10**400, ValueError, ("number",)),
}
BAD_THRESHOLDS = {
    "negative": (-0.5, ValueError, (r"-0\.5", "0 or more")),
    "-inf": (-math.inf, ValueError, ("-inf", "0 or more")),
    "NaN": (math.nan, ValueError, ("nan", "0 or more")),
    "NaN text": ("nan", ValueError, ("nan", "0 or more")),
    "NaN tensor": (torch.tensor(math.nan), ValueError, ("nan", "0 or more")),
}


@pytest.mark.parametrize("kind", [*BAD_NUMBERS, *BAD_THRESHOLDS])
def test_thresholds(backend: Target, kind: str) -> None:
    value, error, words = {**BAD_NUMBERS, **BAD_THRESHOLDS}[kind]
    params = backend.parameters((3,), (2, 2))
    norm = torch.tensor(5.0, device=backend.device)
    calls = {
        "max_norm": [
            lambda: backend.clip_grad_norm_(params, value),
            lambda: backend.clip_grads_with_norm_(params, value, norm),
        ],
        "clip_value": [lambda: backend.clip_grad_value_(params, value)],
    }
    for name, attempts in calls.items():
        for call in attempts:
            raises_untouched(error, (*words, name), params, call, what=f"{name}: {kind}")


@pytest.mark.parametrize("kind", BAD_NUMBERS)
def test_norm_types(backend: Target, kind: str) -> None:
    value, error, words = BAD_NUMBERS[kind]
    params = backend.parameters((3,), (2, 2))
    for call in (
        lambda: backend.clip_grad_norm_(params, 1.0, value),
        lambda: backend.get_total_norm(grads_of(params), value),
        lambda: backend.adaptive_clip_grad_(params, norm_type=value),
        lambda: backend.get_grad_stats(params, value),
    ):
        raises_untouched(error, (*words, "norm_type"), params, call, what=kind)


BAD_BOUNDS: dict[str, tuple[tuple[Any, Any], type[Exception], tuple[str, ...]]] = {
    "both None": ((None, None), ValueError, ("min and max are both None", "at least one")),
    "min > max": ((0.5, 0.25), ValueError, (r"min=0\.5", r"max=0\.25", "exceed")),
    "NaN min": ((math.nan, 1.0), ValueError, ("NaN", "min=nan")),
    "NaN max": ((None, math.nan), ValueError, ("NaN", "max=nan")),
    "text": (("low", 1.0), ValueError, ("'low'", "min")),
    "list": ((0.0, [1.0]), TypeError, (r"\[1\.0\]", "max")),
    "tensors of bounds": ((torch.zeros(2), torch.ones(2)), ValueError, (r"shape \(2,\)", "min")),
}


@pytest.mark.parametrize("kind", BAD_BOUNDS)
def test_bounds(backend: Target, kind: str) -> None:
    bounds, error, words = BAD_BOUNDS[kind]
    params = backend.parameters((3,), (2, 2))
    raises_untouched(error, words, params, lambda: backend.clamp_grad_(params, *bounds), what=kind)
    raises_untouched(error, words, params, lambda: register_clamp_hook(params, *bounds), what=kind)


BAD_TOTAL_NORMS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "float": (2.5, TypeError, (r"2\.5", "float", "0-d Tensor", r"torch\.tensor")),
    "None": (None, TypeError, ("None", "0-d Tensor")),
    "empty": (torch.ones(0), ValueError, (r"shape \(0,\)", "one element")),
    "three elements": (torch.ones(3), ValueError, (r"shape \(3,\)", "one element", "2 parameters")),
    "matrix": (torch.ones(2, 3), ValueError, (r"shape \(2, 3\)", "one element")),
    "complex": (torch.tensor(1j), TypeError, ("torch.complex64", "real", r"abs\(\)")),
    "negative": (torch.tensor(-1.5), ValueError, ("total_norm", "0 or more", "-1.5", "get_total_norm")),
    "one negative": (torch.tensor([2.0, -3.0]), ValueError, ("total_norm", "0 or more", "-3.0")),
    "negative integer": (torch.tensor(-1), ValueError, ("total_norm", "0 or more", "-1")),
}


@pytest.mark.parametrize("kind", BAD_TOTAL_NORMS)
def test_total_norms(backend: Target, kind: str) -> None:
    value, error, words = BAD_TOTAL_NORMS[kind]
    params = backend.parameters((3,), (2, 2))
    raises_untouched(
        error, words, params, lambda: backend.clip_grads_with_norm_(params, 1.0, value), what=kind
    )


# ---------------------------------------------------------------- backend= and foreach=


@pytest.mark.parametrize("name", ["nonsense", "", "Foreach", 3, ["foreach"]], ids=repr)
def test_unknown_backend(name: Any) -> None:
    params = parameters((3,), (2, 2))
    calls = [
        lambda: gradclip_ext.clip_grad_norm_(params, 0.1, backend=name),
        lambda: gradclip_ext.clip_grads_with_norm_(params, 0.1, torch.tensor(2.0), backend=name),
        lambda: gradclip_ext.clip_grad_value_(params, 0.1, backend=name),
        lambda: gradclip_ext.clamp_grad_(params, -0.1, backend=name),
        lambda: gradclip_ext.get_total_norm(grads_of(params), backend=name),
        lambda: gradclip_ext.clip_grad_norm_([], 0.1, backend=name),
    ]
    for call in calls:
        raises_untouched(ValueError, (re.escape(repr(name)), "does not exist", "foreach"), params, call)


@pytest.mark.parametrize("name", list(backends.ALL))
def test_loop_belongs_to_the_foreach_backend(name: str) -> None:
    params = parameters((3,), (2, 2))
    if name == "foreach":
        gradclip_ext.clip_grad_norm_(params, 0.1, foreach=False, backend=name)
        return
    for call in (
        lambda: gradclip_ext.clip_grad_norm_(params, 0.1, foreach=False, backend=name),
        lambda: gradclip_ext.clip_grad_value_(params, 0.1, foreach=False, backend=name),
    ):
        raises_untouched(ValueError, ("foreach=False", repr(name)), params, call)


def test_foreach_on_a_device_without_it() -> None:
    meta = torch.nn.Parameter(torch.empty(3, device="meta"))
    meta.grad = torch.empty(3, device="meta")
    sentence = "foreach=True was passed, but can't use the foreach API on meta tensors"
    for params in ([meta], [meta, *parameters((3,))]):
        good, norm = [p for p in params if p is not meta], torch.tensor(2.0)
        for call, *args in (
            (gradclip_ext.clip_grad_norm_, params, 0.1, 2.0, False, True),
            (gradclip_ext.clip_grads_with_norm_, params, 0.1, norm, True),
            (gradclip_ext.clip_grad_value_, params, 0.1, True),
            (gradclip_ext.get_total_norm, [p.grad for p in params], 2.0, False, True),
        ):
            raises_untouched(RuntimeError, (re.escape(sentence),), good, call, *args)
