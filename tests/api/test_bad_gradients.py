"""Gradients that cannot be clipped: the exception, its message, and all gradients left as they were."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import oracle
import pytest
import torch
from cases import Target, raises_untouched, random
from oracle import parameter

from gradclip_ext import register_clamp_hook


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
