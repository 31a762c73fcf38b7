"""What skip_step_ refuses, and a torch that does not skip as it should."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import optimizers
import pytest
import torch
from optimizers import FUSED
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradclip_ext import skip_step_, skipping

TRUE = torch.tensor(True)


def refused(optimizer: Any, error: type[Exception], *words: str, when: Any = TRUE) -> None:
    """Assert that the call raises with these words, and leaves nothing on the optimizer."""
    before = set(vars(optimizer)) if isinstance(optimizer, Optimizer) else set()
    with pytest.raises(error) as caught:
        skip_step_(optimizer, when)
    for word in words:
        assert word in str(caught.value), f"no {word!r} in {caught.value}"
    if before:
        assert set(vars(optimizer)) == before
        assert not optimizer._optimizer_step_pre_hooks and not optimizer.state


def others() -> Iterator[str]:
    for name in ("RMSprop", "NAdam", "Adamax", "RAdam", "Rprop", "ASGD", "Adadelta", "Adafactor", "Muon"):
        if hasattr(torch.optim, name):
            yield name


@pytest.mark.parametrize("name", list(others()))
def test_optimizers_without_a_fused_step(name: str) -> None:
    optimizer = getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(2, 2))])
    refused(optimizer, TypeError, f"{name} has no fused step", "fused=True", "when.item()")


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": False}], ids=str)
def test_groups_that_are_not_fused(options: dict[str, Any]) -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    refused(AdamW(params, **options), TypeError, "param_groups (all)", "AdamW(..., fused=True)")
    groups: list[dict[str, Any]] = [{"params": [p]} for p in params]
    mixed = SGD(groups, lr=0.1, fused=True)
    mixed.param_groups[0]["fused"] = mixed.param_groups[2]["fused"] = False
    refused(mixed, TypeError, "param_groups (0, 2)", "fused=True")


def test_other_bad_optimizers() -> None:
    class Own(Adam):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    params = [torch.nn.Parameter(torch.ones(2))]
    refused(Own(params, fused=True), TypeError, "Own replaces the step of Adam", "when.item()")
    refused("Adam", TypeError, "torch.optim.Optimizer", "str")
    refused(torch.nn.Linear(2, 2), TypeError, "torch.optim.Optimizer", "Linear")
    dampened = SGD([{"params": params}], lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    refused(dampened, ValueError, "param_groups[0]", "dampening=0.5", "dampening=0,")
    on_mps = Adam(params, fused=True)
    on_mps.param_groups[0]["params"] = [SimpleNamespace(device=torch.device("mps"))]
    refused(on_mps, TypeError, "MPS", "when.item()")


BAD_CONDITIONS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "a norm": (torch.tensor(3.0), TypeError, ("torch.float32", "comparison", "total_norm > ")),
    "a number": (0.5, TypeError, ("comparison",)),
    "complex": (torch.tensor(1j), TypeError, ("comparison",)),
    "vector": (torch.tensor([True, False]), ValueError, ("shape (2,)", "when.any()")),
    "empty": (torch.tensor([], dtype=torch.bool), ValueError, ("shape (0,)",)),
    "None": (None, TypeError, ("boolean", "None")),
    "text": ("yes", TypeError, ("boolean", "'yes'")),
}


@pytest.mark.parametrize("kind", BAD_CONDITIONS)
def test_bad_conditions(kind: str) -> None:
    when, error, words = BAD_CONDITIONS[kind]
    refused(Adam([torch.nn.Parameter(torch.ones(2))], fused=True), error, *words, when=when)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("change", ["ignores it", "always skips", "refuses it"])
def test_a_torch_that_works_otherwise(monkeypatch: pytest.MonkeyPatch, change: str, name: str) -> None:
    """The first call in a process tries one element, and finds out."""
    kind, _ = FUSED[name]
    monkeypatch.setattr(skipping, "_PROVEN", set())
    operator = {"Adam": "_fused_adam_", "AdamW": "_fused_adamw_", "SGD": "_fused_sgd_"}.get(
        kind.__name__, "_fused_adagrad_"
    )
    original = getattr(torch, operator)

    def changed(*args: Any, found_inf: Any = None, **kwargs: Any) -> None:
        if change == "refuses it":
            raise AssertionError("Expected found_inf to be None")
        original(*args, found_inf=torch.ones(()) if change == "always skips" else None, **kwargs)

    optimizer = optimizers.fused(name)(optimizers.weights())
    optimizer.state.clear()  # Adagrad's is there from the start
    with monkeypatch.context() as patch:
        patch.setattr(torch, operator, changed)
        refused(optimizer, RuntimeError, kind.__name__, torch.__version__, "cpu", "when.item()")
    skip_step_(optimizer, TRUE)
    assert skipping._PROVEN


def test_hooks_on_all_optimizers_do_not_see_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skipping, "_PROVEN", set())
    seen: list[Any] = []
    handle = register_optimizer_step_pre_hook(lambda o, a, k: seen.append(o))
    try:
        skip_step_(optimizers.fused("AdamW")(optimizers.weights()), TRUE)
    finally:
        handle.remove()
    assert not seen
