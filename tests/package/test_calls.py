"""The report of calls and of the patch, and the rows in a profiler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import parameters
from subprocesses import run_python
from torch._dynamo.testing import CompileCounter
from torch.profiler import ProfilerActivity, profile

import gradclip_ext
from gradclip_ext import _extension, backends, calls, info


@pytest.fixture(autouse=True)
def _none_counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(calls, "_counts", {})
    monkeypatch.delenv("GRADCLIP_EXT_BACKEND", raising=False)
    yield


def counted() -> dict[tuple[str, str], int]:
    return dict(calls._counts)


def optimizer_step(**settings: Any) -> None:
    params = parameters((3,), (4,))
    optimizer = torch.optim.SGD(params, lr=0.1)
    with gradclip_ext.register_clip_hook(optimizer, **settings):
        optimizer.step()


def unscale() -> None:
    params = parameters((3,), (4,))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    gradclip_ext.unscale_and_clip_grad_norm_(scaler, torch.optim.SGD(params, lr=0.1), 1.0)


CALLS: dict[str, Callable[[], Any]] = {
    "clip_grad_norm_": lambda: gradclip_ext.clip_grad_norm_(parameters((3,), (4,)), 1.0),
    "get_total_norm": lambda: gradclip_ext.get_total_norm([torch.ones(3)]),
    "clip_grads_with_norm_": lambda: gradclip_ext.clip_grads_with_norm_(
        parameters((3,)), 1.0, torch.tensor(2.0)
    ),
    "clip_grad_value_": lambda: gradclip_ext.clip_grad_value_(parameters((3,)), 1.0),
    "clamp_grad_": lambda: gradclip_ext.clamp_grad_(parameters((3,)), -1.0, 2.0),
    "get_grad_stats": lambda: gradclip_ext.get_grad_stats(parameters((3,))),
    "adaptive_clip_grad_": lambda: gradclip_ext.adaptive_clip_grad_(parameters((3,), (4, 2))),
    "unscale_and_clip_grad_norm_": unscale,
    "register_clip_hook": lambda: optimizer_step(max_norm=1.0),
}
PARAMETRIZED = pytest.mark.parametrize("function", CALLS)


@PARAMETRIZED
def test_each_call_is_counted_with_the_backend(function: str) -> None:
    for number in (1, 2):
        CALLS[function]()
        ((name, how), count), *others = counted().items()
        assert (name, count, others) == (function, number, [])
        assert how == "cpu" or (_extension.C is None and how.startswith("foreach: cpu: "))


@PARAMETRIZED
def test_each_call_is_a_row_of_a_profiler(function: str) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        CALLS[function]()
    found = [event.count for event in profiled.key_averages() if event.key == f"gradclip_ext::{function}"]
    assert found == [1]


def test_skipping_a_step_is_a_row_of_a_profiler() -> None:
    optimizer = torch.optim.SGD(parameters((3,)), lr=0.1, fused=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        gradclip_ext.skip_step_(optimizer, torch.tensor(True))
    assert "gradclip_ext::skip_step_" in {event.key for event in profiled.key_averages()}


def test_why_torch_operations_handled_it(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters((3,), (4,))
    gradclip_ext.clip_grad_norm_(params, 1.0, foreach=False)
    gradclip_ext.clip_grad_norm_(params, 1.0, backend="foreach")
    monkeypatch.setenv("GRADCLIP_EXT_BACKEND", "foreach")
    gradclip_ext.clip_grad_norm_(params, 1.0)
    monkeypatch.delenv("GRADCLIP_EXT_BACKEND")
    with torch.overrides.BaseTorchFunctionMode():
        gradclip_ext.clip_grad_norm_(params, 1.0)
    gradclip_ext.clip_grad_norm_([torch.nn.Parameter(torch.ones(3))], 1.0)
    with torch._subclasses.FakeTensorMode():
        fake = torch.nn.Parameter(torch.ones(3))
        fake.grad = torch.ones(3)
        gradclip_ext.clip_grad_norm_(fake, 1.0)
    assert counted() == {
        ("clip_grad_norm_", how): 1
        for how in (
            "foreach: foreach=False asks for a loop",
            "foreach: backend=foreach",
            "foreach: GRADCLIP_EXT_BACKEND=foreach",
            "foreach: a tracer, mode or transform has to see every operation",
            "nothing: no gradients",
            "torch.nn.utils: a tensor subclass that dispatches by itself",
        )
    }


@pytest.mark.skipif(_extension.C is None, reason="kernels are not there")
def test_a_list_may_be_handled_by_two() -> None:
    params = parameters((6, 6), (4,))
    params[0].grad = torch.ones(6, 12)[:, ::2]
    gradclip_ext.clip_grad_norm_(params, 1.0)
    ((_, how),) = counted()
    assert how.startswith("cpu, foreach: gradients that cpu does not handle")


def test_without_kernels_the_report_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu", "cuda", "triton"):
        monkeypatch.setattr(backends._AUTOMATIC[name], "why_unavailable", lambda device: "not here")
    gradclip_ext.get_total_norm([torch.ones(3)])
    ((_, how),) = counted()
    assert how == "foreach: cpu: not here, cuda: not here, triton: not here"


def test_compiled_calls_are_not_counted() -> None:
    """Nor may a count be a guard: it would compile again at every call."""
    counter = CompileCounter()
    clip = torch.compile(gradclip_ext.clip_grad_norm_, backend=counter, fullgraph=True)
    params = parameters((3,), (4,))
    for _ in range(3):
        clip(params, 1.0)
        gradclip_ext.get_total_norm([torch.ones(3)])
    assert counter.frame_count == 1
    assert {function for function, _ in counted()} == {"get_total_norm"}


def test_report() -> None:
    assert "patch        none in this process" in info.report()
    assert "calls        none in this process" in info.report()
    for _ in range(12):
        gradclip_ext.clip_grad_norm_(parameters((3,)), math.inf, backend="foreach")
    with gradclip_ext.patch_torch():
        lines = info.report().splitlines()
    assert "  torch.nn.utils.clip_grad_norm_" in lines
    assert "         12  clip_grad_norm_          foreach: backend=foreach" in lines


SCRIPT = """
import sys, torch, gradclip_ext
sys.stderr = sys.stdout
gradclip_ext.get_total_norm([torch.ones(3)], backend="foreach")
"""


@pytest.mark.parametrize("variable", ["1", "0"])
def test_report_at_exit(variable: str) -> None:
    said = run_python("-c", SCRIPT, timeout=60, GRADCLIP_EXT_REPORT=variable, RANK="3")
    assert ("rank 3" in said and "1  get_total_norm " in said) == (variable == "1")
