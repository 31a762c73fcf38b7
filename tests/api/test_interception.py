"""Under a tracer, torch.func or a mode: torch's operations alone, and nothing depends on a value."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from cases import Target, clones, random
from dispatch import RecordDispatch
from oracle import parameter
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import gradclip_ext
from gradclip_ext.interception import is_intercepted

ORDERS = (0.0, 1.0, 2.0, 3.0, math.inf)


def clipped(grads: list[Tensor], norm_type: float = 2.0) -> tuple[Tensor, list[Tensor]]:
    params = [torch.nn.Parameter(torch.empty(g.shape)) for g in grads]
    for param, grad in zip(params, grads):
        param.grad = grad.clone()
    norm = gradclip_ext.clip_grad_norm_(params, 1.0, norm_type)
    gradclip_ext.clamp_grad_(params, -0.2, 0.3)
    return norm, [p.grad for p in params]


def assert_clipped_alike(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)


class Record(TorchFunctionMode):
    """Records the names of torch's functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_what_counts_as_intercepted() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(is_intercepted())
        return x * 2

    look(torch.ones(2))
    with torch.no_grad(), torch.autocast("cpu"), torch.device("cpu"):
        look(torch.ones(2))
    assert seen == [False, False]
    torch.func.vmap(look)(torch.ones(2))
    torch.func.grad(lambda x: look(x).sum())(torch.ones(2))
    torch.jit.trace(look, (torch.ones(2),), check_trace=False)
    make_fx(look)(torch.ones(2))
    with FlopCounterMode(display=False):
        look(torch.ones(2))
    with Record():
        look(torch.ones(2))
    with torch.device("cpu"), Record():
        look(torch.ones(2))
    with forward_ad.dual_level():
        look(torch.ones(2))
    assert seen == [False] * 2 + [True] * 8
    look(torch.ones(2))
    assert seen[-1] is False, "something of a mode was left behind"


def test_a_default_device_does_not_count(default_device: None) -> None:
    """torch.set_default_device is a mode too, and must not switch the kernels off."""
    assert not is_intercepted()


def test_results_under_a_default_device(backend: Target, default_device: None) -> None:
    """Every tensor that a call makes names its device."""
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        with torch.device("cpu"):
            grads = [backend.random(40, dtype=dtype), backend.random(6, 3, dtype=dtype)[::2]]
        before = clones(grads)
        for norm_type in (0.0, 1.0, 2.0, 3.0, math.inf, -1.0):
            norm = backend.get_total_norm(grads, norm_type)
            with torch.device("cpu"):
                oracle.assert_norm(norm, before, norm_type)
        norm = backend.clip_grad_norm_([parameter(g) for g in grads], 0.5)
        with torch.device("cpu"):
            oracle.assert_scaled(grads, before, norm, 0.5)
        if not dtype.is_complex:
            expected = [g.clamp(-0.01, 0.02) for g in grads]
            backend.clamp_grad_([parameter(g) for g in grads], -0.01, 0.02)
            for grad, clamped in zip(grads, expected):
                oracle.assert_same_bits(grad, clamped)


@pytest.mark.parametrize("mode", [Record, RecordDispatch])
def test_a_mode_sees_torch_operations(mode: type) -> None:
    calls = {
        ("norm", "dot"): lambda p: gradclip_ext.clip_grad_norm_(p, 1.0),
        ("mul",): lambda p: gradclip_ext.clip_grads_with_norm_(p, 1.0, torch.tensor(9.0)),
        ("clamp",): lambda p: gradclip_ext.clamp_grad_(p, -0.1, 0.1),
    }
    for words, call in calls.items():
        with mode() as seen:
            call([parameter(torch.ones(4)), parameter(torch.ones(2))])
        assert any(word in name for name in seen.names for word in words), (words, seen.names)


def test_a_mode_of_another_thread_does_not_count() -> None:
    """torch's own is_in_torch_dispatch_mode() answers for all threads together."""
    seen: list[bool] = []
    for mode in (FlopCounterMode(display=False), Record()):
        with mode:
            thread = threading.Thread(target=lambda: seen.append(is_intercepted()))
            thread.start()
            thread.join()
    assert seen == [False, False]


def test_a_parameter_that_is_listed_twice_counts_once() -> None:
    grad = random(4)
    param = parameter(grad.clone())
    with FlopCounterMode(display=False):
        norm = gradclip_ext.clip_grad_norm_([param, param], 0.5)
    oracle.assert_norm(norm, [grad], 2.0)
    oracle.assert_scaled([param.grad], [grad], norm, 0.5)


def test_a_tensor_that_is_listed_twice_counts_twice() -> None:
    grad = random(4)
    with FlopCounterMode(display=False):
        norm = gradclip_ext.get_total_norm([grad, grad.view(4)])
    oracle.assert_norm(norm, [grad, grad], 2.0)


@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("trace", [make_fx, torch.jit.trace], ids=["make_fx", "jit"])
@pytest.mark.filterwarnings("ignore")
def test_a_trace_holds_for_other_values(trace: Callable[..., Any], norm_type: float) -> None:
    """A trace of a call that clips nothing clips when it has to."""

    def step(a: Tensor, b: Tensor) -> list[Tensor]:
        norm, grads = clipped([a, b], norm_type)
        return [norm, *grads]

    small = [random(3, 2) * 1e-4, random(7) * 1e-4]
    traced = trace(step)(*small) if trace is make_fx else trace(step, tuple(small), check_trace=False)
    for scale in (1e-4, 1.0, 50.0):
        grads = [random(3, 2) * scale, random(7) * scale]
        assert_clipped_alike(list(traced(*grads)), step(*grads))


@pytest.mark.parametrize("norm_type", ORDERS)
def test_torch_func(norm_type: float) -> None:
    batch = random(4, 3, 2)
    norms = torch.func.vmap(lambda grad: gradclip_ext.get_total_norm([grad], norm_type))(batch)
    for norm, grad in zip(norms, batch):
        oracle.assert_norm(norm, [grad], norm_type)

    def loss(x: Tensor) -> Tensor:
        norm, (grad,) = clipped([x.detach() * 3], norm_type)
        return (grad * x).sum() * norm

    x = random(5)
    norm, (grad,) = clipped([x * 3], norm_type)
    assert_clipped_alike(torch.func.grad(loss)(x), grad * norm)


def test_a_mode_that_fakes() -> None:
    param = parameter(random(3))
    with oracle.unchanged([param.grad]), FakeTensorMode(allow_non_fake_inputs=True):
        norm = gradclip_ext.clip_grad_norm_([param], 1e-3)
    assert norm.shape == ()


@pytest.mark.parametrize("max_norm", [1e-3, 1e6, math.inf])
def test_saved_tensors_that_may_be_changed(max_norm: float) -> None:
    """The mode copies a saved tensor when its version counter shows a change."""
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        x, param = torch.ones(2, requires_grad=True), parameter(random(2))
        before = param.grad.clone()
        product = (x * param.grad).sum()
        gradclip_ext.clip_grad_norm_([param], max_norm)
        with torch.no_grad():
            param.grad.mul_(7)
        product.backward()
    oracle.assert_same_bits(x.grad, before)


@pytest.mark.parametrize("norm_type", (*ORDERS, -1.0))
def test_a_default_device(norm_type: float) -> None:
    grads = [random(9)[::2], random(3), torch.view_as_complex(random(4, 2))]
    expected = gradclip_ext.get_total_norm(grads, norm_type)
    with torch.device("meta"):
        oracle.assert_same_bits(gradclip_ext.get_total_norm(grads, norm_type), expected)
