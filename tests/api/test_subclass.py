"""Tensor subclasses: torch's functions handle those that dispatch; others are handled as plain tensors."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
import torch.utils._pytree as pytree
from cases import Target, clones, grads_of, random
from oracle import parameter
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

import gradclip_ext
from gradclip_ext import gradients

# ---------------------------------------------------------------- FakeTensor


def test_fake_tensors() -> None:
    with FakeTensorMode():
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        model(torch.randn(4, 3)).sum().backward()
        params = list(model.parameters())
        assert all(isinstance(g, FakeTensor) for g in grads_of(params))
        for norm_type in (0.0, 0.5, 1.0, 2.0, math.inf):
            norm = gradclip_ext.clip_grad_norm_(params, 1.0, norm_type)
            assert isinstance(norm, FakeTensor) and norm.shape == ()
            total = gradclip_ext.get_total_norm(grads_of(params), norm_type)
            assert isinstance(total, FakeTensor) and total.shape == ()
        gradclip_ext.clip_grads_with_norm_(params, 1.0, norm)
        gradclip_ext.clip_grad_value_(params, 0.1)
        gradclip_ext.clamp_grad_(params, -0.1, None)
        with gradclip_ext.register_clamp_hook(model, -0.1, 0.1):
            model(torch.randn(4, 3)).sum().backward()


def test_fake_tensors_with_a_bad_threshold() -> None:
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        with pytest.raises(ValueError):
            gradclip_ext.clip_grad_norm_(param, -1.0)


# ---------------------------------------------------------------- a wrapper with __torch_dispatch__


class Wrapped(Tensor):
    """A tensor without memory of its own: data_ptr() is 0 for all of them, as with DTensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        if func._schema.is_mutable:
            return args[0] if func._schema.returns else None
        return pytree.tree_map_only(Tensor, Wrapped, result)


def wrapped(inner: Tensor) -> torch.nn.Parameter:
    param = torch.nn.Parameter(Wrapped(torch.empty_like(inner)))
    param.grad = Wrapped(inner)
    return param


def test_dispatch_subclass_goes_whole_to_torch() -> None:
    """Beside a plain gradient too, and never by pointer: three wrappers are not three duplicates."""
    sources = [random(64), random(3), random(2, 2)]  # of 64 values some are beyond any threshold below
    calls = {
        "clip_grad_norm_": (gradclip_ext.clip_grad_norm_, torch.nn.utils.clip_grad_norm_, (0.5,)),
        "p = inf": (gradclip_ext.clip_grad_norm_, torch.nn.utils.clip_grad_norm_, (0.5, math.inf)),
        "value": (gradclip_ext.clip_grad_value_, torch.nn.utils.clip_grad_value_, (0.1,)),
        "with norm": (
            gradclip_ext.clip_grads_with_norm_,
            torch.nn.utils.clip_grads_with_norm_,
            (0.5, torch.tensor(4.0)),
        ),
    }
    for name, (ours, theirs, args) in calls.items():
        lists = []
        for function in (ours, theirs):
            inner = clones(sources)
            result = function([wrapped(inner[0]), parameter(inner[1]), wrapped(inner[2])], *args)
            lists.append([*inner, *([result.inner] if isinstance(result, Wrapped) else [])])
        assert len(lists[0]) == len(lists[1]), name
        for one, other in zip(*lists):
            oracle.assert_same_bits(one, other, name)
        assert not torch.equal(lists[0][0], sources[0]), f"{name} did nothing"


def test_clamp_of_a_dispatch_subclass() -> None:
    """torch has no such function; bounds are coerced here as everywhere."""
    for low, high in ((-0.1, 0.2), ("-0.1", torch.tensor(0.2)), (None, 0.2)):
        inner = random(5)
        expected = inner.clamp(None if low is None else -0.1, 0.2)
        gradclip_ext.clamp_grad_([wrapped(inner)], low, high)
        oracle.assert_same_bits(inner, expected)


def test_norm_of_dispatch_subclasses() -> None:
    tensors = [random(3), random(3), random(3)]
    norm = gradclip_ext.get_total_norm([Wrapped(t) for t in tensors])
    torch.testing.assert_close(norm.inner, torch.cat(tensors).norm())


def test_what_torch_cannot_do_is_refused() -> None:
    inner = [random(64), random(3)]
    params = [wrapped(inner[0]), parameter(inner[1])]
    norm = torch.tensor([1.0, 2.0])
    for words, call in {
        "max_norm as a tensor or function": lambda: gradclip_ext.clip_grad_norm_(params, lambda n: n),
        "zero_if_nonfinite": lambda: gradclip_ext.clip_grad_norm_(params, 1.0, zero_if_nonfinite=True),
        "per_tensor=True": lambda: gradclip_ext.clip_grad_norm_(params, 1.0, per_tensor=True),
        "get_grad_stats": lambda: gradclip_ext.get_grad_stats(params),
        "adaptive_clip_grad_": lambda: gradclip_ext.adaptive_clip_grad_(params),
        "total_norm of several": lambda: gradclip_ext.clip_grads_with_norm_(params, 1.0, norm),
    }.items():
        with oracle.unchanged(inner), pytest.raises(NotImplementedError, match=words):
            call()


def test_wrapped_total_norm() -> None:
    (param,) = (parameter(random(3)),)
    expected = param.grad / 4
    gradclip_ext.clip_grads_with_norm_(param, 1.0, Wrapped(torch.tensor(4.0)))
    grad = param.grad.inner if isinstance(param.grad, Wrapped) else param.grad
    torch.testing.assert_close(grad, expected)


# ---------------------------------------------------------------- only __torch_function__


class Tagged(Tensor):
    """Differs from a tensor only in its type; it has memory."""


class Refusing(Tensor):
    """Records torch operations that a fused path runs on the subclass itself."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in (
            "_foreach_mul_",
            "_foreach_norm",
            "vector_norm",
            "linalg_vector_norm",
        ):
            raise AssertionError(f"{func} reached a subclass")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("kind", [Tagged, Refusing])
def test_function_subclass_is_treated_as_plain(backend: Target, kind: type) -> None:
    assert not gradients.has_dispatch_subclass([random(2).as_subclass(kind)])
    for name, call in backend.calls().items():
        plain = backend.parameters((4,), (3, 2))
        tagged = [parameter(g) for g in clones(grads_of(plain))]
        for param in tagged:
            param.grad = param.grad.as_subclass(kind)
        grads, versions = grads_of(tagged), [p.grad._version for p in tagged]
        results = call(tagged), call(plain)
        assert all(p.grad is g and type(p.grad) is kind for p, g in zip(tagged, grads)), name
        assert all(g._version > old for g, old in zip(grads, versions)), name
        for one, other in zip([*grads, *results], [*grads_of(plain), *results[::-1]]):
            if one is not None:
                oracle.assert_same_bits(one.as_subclass(Tensor), other.as_subclass(Tensor), name)


def test_function_subclass_in_get_total_norm(backend: Target) -> None:
    tensors = [backend.random(4), backend.random(3, 2)]
    norm = backend.get_total_norm([tensors[0].as_subclass(Refusing), tensors[1]])
    oracle.assert_norm(norm.as_subclass(Tensor), tensors, 2.0)
