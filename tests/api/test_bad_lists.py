"""Arguments that are not lists of tensors: the exception, its message, and unchanged gradients."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from cases import Target, parameters, raises_untouched, random

import gradclip_ext
from gradclip_ext import register_clamp_hook


class Wrong(NamedTuple):
    """An argument made from a model with gradients, and the words that the message must hold."""

    make: Callable[[torch.nn.Module], Any]
    words: tuple[str, ...]


NOT_TENSORS = {
    "module": Wrong(lambda m: m[0], ("module Linear", r"pass .*module\.parameters\(\)")),
    "iterable module": Wrong(lambda m: m, ("Linear", "position 0", r"pass .*module\.parameters\(\)")),
    "None": Wrong(lambda m: None, ("None", "iterable of Tensors")),
    "number": Wrong(lambda m: 3.5, (r"3\.5", "float", "iterable of Tensors")),
    "text": Wrong(lambda m: "weights", ("'weights'", "str", "iterable of Tensors")),
    "names with tensors": Wrong(
        lambda m: m.named_parameters(), ("tuple", r"parameters\(\), not named_parameters")
    ),
    "dict": Wrong(lambda m: dict(m.named_parameters()), ("'0.weight'", "dict", r"values\(\)")),
    "None inside": Wrong(lambda m: [*m.parameters(), None], ("None", "position 4")),
    "number inside": Wrong(lambda m: [*m.parameters(), 1.0], (r"1\.0", "float", "position 4")),
    "text inside": Wrong(lambda m: [*m.parameters(), "x"], ("'x'", "str", "position 4")),
    "module inside": Wrong(
        lambda m: [*m.parameters(), m], ("Sequential", "position 4", r"module\.parameters\(\)")
    ),
    "nested list": Wrong(lambda m: [*m.parameters(), [*m.parameters()]], ("list", "position 4", "flatten")),
    "optimizer": Wrong(
        lambda m: torch.optim.SGD(m.parameters(), 0.1),
        (r"^[^\n]* got SGD \( Parameter Group 0 [^\n]*$", r"group\['params'\]"),
    ),
    "optimizer group": Wrong(
        lambda m: torch.optim.SGD(m.parameters(), 0.1).param_groups[0], ("dict", r"pass group\['params'\]")
    ),
    "state_dict": Wrong(
        lambda m: m.state_dict(), ("OrderedDict", r"pass (module\.parameters|its values)\(\)")
    ),
    "method": Wrong(lambda m: m.parameters, ("method", r"call it, parameters\(\)")),
    "module of names": Wrong(
        lambda m: torch.nn.ParameterDict({"a": m[0].weight}), ("'a'", "position 0", r"values\(\)")
    ),
    "optimizer groups": Wrong(
        lambda m: torch.optim.SGD(m.parameters(), 0.1).param_groups,
        ("dict", "position 0", r"group\['params'\]"),
    ),
}


@pytest.mark.parametrize("kind", NOT_TENSORS)
def test_not_tensors(backend: Target, kind: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)).to(backend.device)
    model(backend.random(4, 3)).sum().backward()
    wrong = NOT_TENSORS[kind]
    calls = {**backend.calls(), "get_total_norm": backend.get_total_norm}
    for name, call in calls.items():
        good = list(model.parameters())
        raises_untouched(TypeError, wrong.words, good, call, wrong.make(model), what=f"{name}: {kind}")


@pytest.mark.parametrize("kind", [k for k in NOT_TENSORS if "module" not in k or "inside" in k])
def test_not_tensors_to_hook(kind: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    with pytest.raises(TypeError) as caught:
        register_clamp_hook(NOT_TENSORS[kind].make(model), -1, 1)
    for word in NOT_TENSORS[kind].words:
        assert re.search(word, str(caught.value), re.IGNORECASE), caught.value
    model(random(4, 3)).sum().mul(1e3).backward()
    assert max(p.grad.abs().max() for p in model.parameters()) > 1, "a hook was left behind"


class Parameters(torch.nn.Module):
    """A module that can be iterated over, which torch accepts."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self._listed = parameters

    def __iter__(self) -> Iterator[torch.nn.Parameter]:
        return iter(self._listed)


class Indexed:
    """A sequence by the old protocol: __getitem__ until IndexError."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._listed = parameters

    def __getitem__(self, index: int) -> torch.nn.Parameter:
        return self._listed[index]


@pytest.mark.parametrize(
    "container",
    [
        pytest.param(Parameters, id="iterable module"),
        pytest.param(Indexed, id="only __getitem__"),
        pytest.param(torch.nn.ParameterList, id="ParameterList"),  # a module too, but torch takes it
        pytest.param(lambda params: dict.fromkeys([*params, *params]), id="dict"),  # each once, in order
    ],
)
def test_unusual_iterables_of_tensors(container: Callable[[list[torch.nn.Parameter]], Any]) -> None:
    calls: list[Callable[[Any], Any]] = [
        lambda params: gradclip_ext.clip_grad_norm_(params, 0.5),
        lambda params: gradclip_ext.clip_grads_with_norm_(params, 0.5, torch.tensor(3.0)),
        lambda params: gradclip_ext.clip_grad_value_(params, 0.1),
        lambda params: gradclip_ext.clamp_grad_(params, -0.1),
        gradclip_ext.get_total_norm,
    ]
    for call in calls:
        params = parameters((64,), (2, 2))
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        for param, twin in zip(params, twins):
            twin.grad = param.grad.clone()
        results = call(container(params)), call(twins)
        if results[0] is not None:
            oracle.assert_same_bits(*results)
        for param, twin in zip(params, twins):
            oracle.assert_same_bits(param.grad, twin.grad)


# ---------------------------------------------------------------- the empty generator


def test_empty_generator_warns_at_the_callers_line() -> None:
    calls: dict[str, Callable[[Any], Any]] = {
        "clip_grad_norm_": lambda empty: gradclip_ext.clip_grad_norm_(empty, 1.0),
        "clip_grad_value_": lambda empty: gradclip_ext.clip_grad_value_(empty, 1.0),
        "clamp_grad_": lambda empty: gradclip_ext.clamp_grad_(empty, 1.0),
        "clip_grads_with_norm_": lambda empty: gradclip_ext.clip_grads_with_norm_(
            empty, 1.0, torch.tensor(1.0)
        ),
    }
    for name, call in calls.items():
        model = torch.nn.Linear(2, 2)
        exhausted = model.parameters()
        assert len(list(exhausted)) == 2
        with pytest.warns(UserWarning) as caught:
            call(exhausted)
        assert len(caught) == 1
        assert (
            str(caught[0].message) == "`parameters` is an empty generator, no gradient clipping will occur."
        )
        assert caught[0].filename == __file__
        assert f"gradclip_ext.{name}(" in linecache.getline(__file__, caught[0].lineno)


def test_empty_generator_to_hook_warns_at_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="is an empty generator") as caught:
        register_clamp_hook((p for p in []), -1.0, 1.0)
    assert caught[0].filename == __file__
    assert "register_clamp_hook(" in linecache.getline(__file__, caught[0].lineno)
