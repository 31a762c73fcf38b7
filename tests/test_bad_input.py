"""Every wrong argument: the type of the exception, a message that says what was passed and what to do,
and gradients that are bit for bit what they were."""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from cases import Target, grads_of, parameters, random
from oracle import parameter

import gradclip_ext
from gradclip_ext import backends, register_clamp_hook


def raises_untouched(
    error: type[Exception],
    words: tuple[str, ...],
    good: list[torch.Tensor],
    call: Callable[..., Any],
    *args: Any,
    what: str = "",
) -> None:
    """Assert that the call raises, that its message holds all the words, and that nothing changed."""
    with oracle.unchanged(grads_of(good), what), pytest.raises(error) as caught:
        call(*args)
    message = str(caught.value)
    assert type(caught.value) is error, f"{what}: {caught.value!r}"
    for word in words:
        assert re.search(word, message, re.IGNORECASE), f"{what}: no {word!r} in {message!r}"


# ---------------------------------------------------------------- what is not a list of tensors


class Wrong(NamedTuple):
    """An argument made from a model with gradients, and what must be said about it."""

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


@pytest.mark.parametrize(
    "container",
    [
        pytest.param(torch.nn.ParameterList, id="ParameterList"),  # a module too, but torch takes it
        pytest.param(lambda params: dict.fromkeys([*params, *params]), id="dict"),  # each once, in order
    ],
)
def test_unusual_iterables_of_tensors(container: Callable[[list[torch.nn.Parameter]], Any]) -> None:
    params = parameters((64,), (2, 2))
    twins = [parameter(p.grad.clone()) for p in params]
    norm = gradclip_ext.clip_grad_norm_(container(params), 0.5)
    oracle.assert_same_bits(norm, gradclip_ext.clip_grad_norm_(twins, 0.5))
    for param, twin in zip(params, twins):
        oracle.assert_same_bits(param.grad, twin.grad)


# ---------------------------------------------------------------- gradients that cannot be clipped


def integer_parameter(device: str) -> torch.Tensor:
    tensor = torch.ones(3, dtype=torch.int64, device=device)
    tensor.grad = torch.arange(3, device=device)
    return tensor


def float8_parameter(device: str) -> torch.Tensor:
    tensor = torch.zeros(3, device=device).to(torch.float8_e4m3fn)
    tensor.grad = random(3, device=device).to(torch.float8_e4m3fn)
    return tensor


def sparse_parameter(device: str, layout: torch.layout) -> torch.Tensor:
    sparse = random(3, 4).to_sparse(layout=layout).to(device)
    param = torch.nn.Parameter(sparse.clone())
    param.grad = sparse
    return param


def embedding_parameter(device: str) -> torch.Tensor:
    embedding = torch.nn.Embedding(5, 3, sparse=True, device=device)
    embedding(torch.tensor([1, 4], device=device)).sum().backward()
    return embedding.weight


def expanded_parameter(device: str) -> torch.Tensor:
    param = torch.nn.Parameter(torch.empty(4, 3, device=device))
    param.grad = random(4, 1, device=device).expand(4, 3)
    return param


def lazy_parameter(device: str, bit: str) -> torch.Tensor:
    conjugate = random(3, dtype=torch.complex64, device=device).conj()
    grad = conjugate if bit == "conj" else conjugate.imag
    param = torch.nn.Parameter(torch.empty(3, dtype=grad.dtype, device=device))
    param.grad = grad
    return param


BAD_GRADIENTS: dict[str, tuple[Callable[[str], torch.Tensor], type[Exception], tuple[str, ...]]] = {
    "integer": (integer_parameter, TypeError, ("torch.int64", "float32", "convert")),
    "float8": (float8_parameter, TypeError, ("float8_e4m3fn", "float32", "convert")),
    "sparse coo": (lambda d: sparse_parameter(d, torch.sparse_coo), TypeError, ("sparse_coo", "to_dense")),
    "sparse csr": (lambda d: sparse_parameter(d, torch.sparse_csr), TypeError, ("sparse_csr", "to_dense")),
    "sparse embedding": (embedding_parameter, TypeError, ("sparse_coo", "sparse=False")),
    "expanded": (expanded_parameter, RuntimeError, ("expanded", "single memory location", r"clone\(\)")),
    "conj bit": (lambda d: lazy_parameter(d, "conj"), RuntimeError, ("conjugate", "resolve_conj")),
    "neg bit": (lambda d: lazy_parameter(d, "neg"), RuntimeError, ("negative", "resolve_neg")),
}


def accepts(backend: Target, kind: str, name: str) -> bool:
    """Tell whether a function takes such a gradient, as torch's does."""
    if "sparse" in kind:
        return name == "clip_grads_with_norm_"
    return "bit" in kind and backend.way == "loop" and name != "clamp_grad_"


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
def test_bad_gradient_beside_good_ones(backend: Target, kind: str) -> None:
    make, error, words = BAD_GRADIENTS[kind]
    for name, call in backend.calls().items():
        if accepts(backend, kind, name):
            continue
        for position in (0, 1, 2):
            params = backend.parameters((3,), (2, 2))
            listed = [*params[:position], make(backend.device), *params[position:]]
            told = (*words, rf"gradient {position} ")
            raises_untouched(error, told, params, call, listed, what=f"{name}: {kind} at {position}")


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("kind", [k for k in BAD_GRADIENTS if k not in ("expanded", "conj bit", "neg bit")])
def test_get_total_norm_refuses_the_same(backend: Target, kind: str) -> None:
    make, error, words = BAD_GRADIENTS[kind]
    with pytest.raises(error) as caught:
        backend.get_total_norm([backend.random(3), make(backend.device).grad])
    for word in words:
        assert re.search(word, str(caught.value), re.IGNORECASE), caught.value


def test_inference_gradient_outside_of_inference_mode(backend: Target) -> None:
    """torch refuses to write to it; the gradients before it must not have been scaled by then."""
    with torch.inference_mode():
        grad = backend.random(3)
    for name, call in backend.calls().items():
        params = backend.parameters((3,), (2, 2))
        listed = [*params, parameter(grad)]
        raises_untouched(RuntimeError, ("inference", r"clone"), params, call, listed, what=name)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_clamping_complex_gradients(backend: Target, dtype: torch.dtype) -> None:
    params = [*backend.parameters((3,)), *backend.parameters((2,), dtype=dtype)]
    for call in (lambda: backend.clip_grad_value_(params, 0.1), lambda: backend.clamp_grad_(params, -0.1)):
        raises_untouched(RuntimeError, ("complex", str(dtype)), params, call)
    with pytest.raises(RuntimeError, match="complex"):
        register_clamp_hook(params, -0.1, 0.1)


def test_bounds_at_the_ends_of_a_dtype(backend: Target) -> None:
    for dtype, bound in ((torch.float16, 65505.0), (torch.bfloat16, 3.4e38), (torch.float32, 3.5e38)):
        (param,) = backend.parameters((3,), dtype=dtype)
        for low, high in ((-bound, 1.0), (-1.0, bound)):
            with oracle.unchanged([param.grad]), pytest.raises(RuntimeError, match="cannot be represented"):
                backend.clamp_grad_(param, low, high)
        with oracle.unchanged([param.grad]):
            backend.clamp_grad_(param, -math.inf, math.inf)
            backend.clamp_grad_(param, torch.finfo(dtype).min, torch.finfo(dtype).max)


def test_bound_beyond_the_range_of_the_dtype(backend: Target) -> None:
    params = [*backend.parameters((3,)), *backend.parameters((2,), dtype=torch.float16)]
    words = (r"-?100000\.0", "float16", "65504", "smaller bound")
    calls = {
        "value": lambda: backend.clip_grad_value_(params, 1e5),
        "max": lambda: backend.clamp_grad_(params, max=1e5),
        "min": lambda: backend.clamp_grad_(params, min=-1e5),
        "hook": lambda: register_clamp_hook(params, None, 1e5),
    }
    for name, call in calls.items():
        raises_untouched(RuntimeError, words, params, call, what=name)


# ---------------------------------------------------------------- numbers


BAD_NUMBERS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "text": ("much", ValueError, ("'much'", "number")),
    "None": (None, TypeError, ("None", "number")),
    "list": ([1.0], TypeError, (r"\[1\.0\]", "number")),
    "two elements": (torch.ones(2), ValueError, (r"shape \(2,\)", "number")),
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
    "matrix": (torch.ones(2, 3), ValueError, (r"shape \(2, 3\)", "one element")),
    "complex": (torch.tensor(1j), TypeError, ("torch.complex64", "real", r"abs\(\)")),
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
