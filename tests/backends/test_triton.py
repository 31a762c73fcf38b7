"""The triton backend: when it cannot be used. Tested without Triton.

What it launches: test_triton_calls.py. The kernels themselves: tests/kernels.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import clones, grads_of, parameters
from oracle import assert_same_bits, parameter
from subprocesses import run_with_triton
from triton_fakes import launches

import gradclip_ext
from gradclip_ext import backends
from gradclip_ext.backends.triton import CompileError, TritonBackend

Install = Callable[..., TritonBackend]

# ---------------------------------------------------------------- a kernel cannot be compiled


def test_a_compile_failure_raises_when_the_backend_was_named(log: list, install: Install) -> None:
    install(fails=lambda constants: True)
    params = parameters((3,), (4,))
    before = clones(grads_of(params))
    for call in (
        lambda: gradclip_ext.clip_grad_norm_(params, 0.1, backend="triton"),
        lambda: gradclip_ext.get_total_norm(grads_of(params), backend="triton"),
        lambda: gradclip_ext.clip_grads_with_norm_(params, 0.1, torch.tensor(5.0), backend="triton"),
        lambda: gradclip_ext.clip_grad_value_(params, 0.1, backend="triton"),
    ):
        with pytest.raises(CompileError, match=r"failed to compile \w+_kernel .*no such instruction"):
            call()
    assert launches(log) == []
    for param, old in zip(params, before):
        assert_same_bits(param.grad, old)


def test_a_compile_failure_gives_way_to_foreach_with_one_warning(
    log: list, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = install(fallback=backends.FOREACH, fails=lambda constants: True)
    monkeypatch.setattr(backends, "_AUTOMATIC", {"triton": backend, "foreach": backends.FOREACH})
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    with pytest.warns(RuntimeWarning, match="no such instruction") as caught:
        assert gradclip_ext.clip_grad_norm_(weight, 2.5) == 5.0
    assert len(caught) == 1 and "foreach" in str(caught[0].message)
    torch.testing.assert_close(weight.grad, torch.tensor([1.5, 2.0]))
    assert "no such instruction" in (backend.why_unavailable(torch.device("cpu")) or "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradclip_ext.clip_grad_value_(weight, 1.75)  # foreach has been chosen
        gradclip_ext.clip_grads_with_norm_(weight, 1.0, torch.tensor(2.0), backend="foreach")
    torch.testing.assert_close(weight.grad, torch.tensor([0.75, 0.875]))
    assert launches(log) == []


# For each kernel a call that needs it, of a gradient [3, -4], and the gradient afterwards.
CALLS: dict[str, tuple[Callable[[Any], Any], list[float]]] = {
    "scale_kernel": (lambda p: gradclip_ext.clip_grads_with_norm_(p, 1.0, torch.tensor(2.0)), [1.5, -2.0]),
    "clamp_kernel": (lambda p: gradclip_ext.clamp_grad_(p, -2.0, 1.5), [1.5, -2.0]),
    "scale_each_kernel": (lambda p: gradclip_ext.clip_grad_norm_(p, 2.5, per_tensor=True), [1.5, -2.0]),
    "finalize_each_kernel": (lambda p: gradclip_ext.clip_grad_norm_(p, 2.5, per_tensor=True), [1.5, -2.0]),
    "statistics_kernel": (gradclip_ext.get_grad_stats, [3.0, -4.0]),
    "finalize_statistics_kernel": (gradclip_ext.get_grad_stats, [3.0, -4.0]),
    "adaptive_kernel": (lambda p: gradclip_ext.adaptive_clip_grad_(p, 0.5, eps=5.0), [1.5, -2.0]),
}


@pytest.mark.parametrize("failing", CALLS)
def test_every_operation_gives_way(
    log: list, install: Install, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    backend = install(fallback=backends.FOREACH)
    monkeypatch.setattr(getattr(backend._launcher.kernels, failing), "_fails", lambda constants: True)
    monkeypatch.setattr(backends, "_AUTOMATIC", {"triton": backend, "foreach": backends.FOREACH})
    call, expected = CALLS[failing]
    param = parameter(torch.tensor([3.0, -4.0]))
    param.data.zero_()
    with pytest.warns(RuntimeWarning, match=f"failed to compile {failing}"):
        call(param)
    torch.testing.assert_close(param.grad, torch.tensor(expected))
    assert launches(log) == []


def test_nothing_is_launched_before_everything_compiles(log: list, install: Install) -> None:
    """Else a failure for the second dtype would leave the first one scaled, and foreach scale it again."""
    install(fails=lambda constants: constants.get("DTYPE") is torch.float16)
    params = [parameter(torch.ones(3)), parameter(torch.ones(3, dtype=torch.float16))]
    for call in (
        lambda: gradclip_ext.clip_grad_norm_(params, 1.0, backend="triton"),
        lambda: gradclip_ext.clip_grads_with_norm_(params, 1.0, torch.tensor(5.0), backend="triton"),
        lambda: gradclip_ext.clip_grad_value_(params, 0.5, backend="triton"),
    ):
        with pytest.raises(CompileError):
            call()
    assert launches(log) == []


def test_a_norm_is_not_launched_before_its_last_kernel_compiles(log: list, install: Install) -> None:
    install(fails=lambda constants: "CHUNK" not in constants)  # finalize_kernel alone
    with pytest.raises(CompileError, match="finalize_kernel"):
        gradclip_ext.clip_grad_norm_(parameters((3,)), 1.0, backend="triton")
    assert launches(log) == []


# ---------------------------------------------------------------- reasons


def test_the_automatic_choice_has_a_fallback_and_does_not_choose_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    automatic = backends._AUTOMATIC["triton"]
    assert isinstance(automatic, TritonBackend) and automatic._fallback is backends.FOREACH
    assert automatic is not backends.ALL["triton"]
    assert "if this backend is named" in (
        TritonBackend(backends.FOREACH).why_unavailable(torch.device("cpu")) or ""
    )
    names = list(backends.ALL)
    assert names == list(backends._AUTOMATIC) and names[-1] == "foreach"


def imported(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Make importlib return these modules, or raise these errors."""
    genuine = importlib.import_module

    def import_module(name: str) -> Any:
        found = modules.get(name.rpartition(".")[2])
        if isinstance(found, Exception):
            raise found
        return found or genuine(name)

    monkeypatch.setattr(importlib, "import_module", import_module)


class JITFunction:
    """Replaces Triton's class of compiled kernels."""


@pytest.mark.parametrize("on", [True, False])
def test_reasons(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    """Every reason is a sentence, and there is none where a GPU and a fitting Triton are."""
    kernels = SimpleNamespace(norm_kernel=JITFunction() if on else object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9 - 3 * device.index, 1))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def reason(device: str = "cuda:0", **modules: Any) -> str | None:
        with monkeypatch.context() as patch:
            imported(patch, **modules)
            return TritonBackend().why_unavailable(torch.device(device))

    def triton(version: str) -> Any:
        return SimpleNamespace(__version__=version, JITFunction=JITFunction)

    assert "not for xpu" in (reason("xpu") or "")
    assert "TRITON_INTERPRET=1" in (reason("cpu") or "")
    for missing, said in (
        ("triton", "not installed"),
        ("numpy", "cannot be used here: ModuleNotFoundError: no"),
    ):
        assert said in (reason(triton=ModuleNotFoundError("no " + missing, name=missing)) or "")
    assert "OSError: libcuda" in (reason(triton=OSError("libcuda")) or "")
    assert "2.1.0 is too old: 3.2" in (reason(triton=triton("2.1.0")) or "")
    others = dict.fromkeys(
        ("finalize_kernels", "update_kernels", "segment_kernels", "adaptive_kernels"), kernels
    )
    there = {"triton": triton("3.10.0+git1"), "kernels": kernels, **others}
    if not on:
        assert "cannot read GPU memory" in (reason(**there) or "")
        return
    assert "this device has 6.1" in (reason("cuda:1", **there) or "")
    assert reason("cuda:0", **there) is None, "the GPUs of one machine differ"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "after Triton had been imported" in (reason("cpu", **there) or "")
    # An interpreter that does not work with a newer NumPy fails at its first launch.
    broken = {**there, **dict.fromkeys(("kernels", *others), SimpleNamespace(norm_kernel=object()))}
    assert "cannot be used here: AttributeError" in (reason("cpu", **broken) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA" in (reason(**there) or "")


def test_naming_it_without_triton_says_why() -> None:
    """In a process whose Triton, if there is one, cannot be imported."""
    code = """
import sys, torch
sys.modules["triton"] = None
import gradclip_ext
w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)
assert gradclip_ext.clip_grad_norm_(w, 9.0) > 0
try:
    gradclip_ext.clip_grad_norm_(w, 1.0, backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert "not installed" in run_with_triton("-c", code, timeout=120, interpret=True)
    assert "TRITON_INTERPRET=1" in run_with_triton("-c", code, timeout=120)


def test_triton_is_not_imported_before_it_is_needed() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import gradclip_ext
w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)
gradclip_ext.clip_grad_norm_(w, 1.0)
gradclip_ext.clip_grad_value_(w, 1.0)
print([name for name in set(sys.modules) - before if name.split(".")[0] == "triton"])
"""
    assert run_with_triton("-c", code, timeout=120).strip() == "[]"
