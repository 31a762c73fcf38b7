"""max_norm as a tensor or a function, total_norm with one element for each parameter, zero_if_nonfinite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from cases import Target, clones, grads_of, layout_cases, over_dtypes, raises_untouched, random
from oracle import parameter
from torch import Tensor

import gradclip_ext

NAN, INF = math.nan, math.inf

# What a function may make of a norm, for a limit that is known beforehand.
ANSWERS: dict[str, Callable[[Tensor, float], Any]] = {
    "number": lambda norm, limit: limit,
    "0-d tensor": torch.full_like,
    "one element": lambda norm, limit: torch.full_like(norm, limit).reshape(1, 1),
    "bfloat16": lambda norm, limit: torch.full_like(norm, limit, dtype=torch.bfloat16),
    "float64": lambda norm, limit: torch.full_like(norm, limit, dtype=torch.float64),
}


def twins(backend: Target, *shapes: tuple[int, ...], **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return two lists of parameters with the same gradients."""
    params = backend.parameters(*shapes, **options)
    return params, [parameter(g.clone()) for g in grads_of(params)]


def assert_same_grads(one: list[Tensor], other: list[Tensor], what: str = "") -> None:
    for index, (a, b) in enumerate(zip(grads_of(one), grads_of(other), strict=True)):
        oracle.assert_same_bits(a, b, f"{what}: gradient {index}")


# ---------------------------------------------------------------- a tensor or a function as max_norm


@over_dtypes
@pytest.mark.parametrize("kind", ANSWERS)
def test_function_gives_the_bits_of_its_number(backend: Target, dtype: torch.dtype, kind: str) -> None:
    for limit in (0.0, 0.5, 1e6, INF):
        ours, theirs = twins(backend, (30,), (), (4, 5), (0,), dtype=dtype)
        seen: list[Tensor] = []

        def rule(norm: Tensor, limit: float = limit, seen: list[Tensor] = seen) -> Any:
            seen.append(norm)
            return ANSWERS[kind](norm, limit)

        norm, expected = backend.clip_grad_norm_(ours, rule), backend.clip_grad_norm_(theirs, limit)
        oracle.assert_same_bits(norm, expected)
        assert len(seen) == 1
        oracle.assert_same_bits(seen[0], norm)
        assert_same_grads(ours, theirs, f"{kind}, {limit}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_tensor_gives_the_bits_of_its_number(
    backend: Target, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for number in (0, 2, 1000):
        limit = torch.full(shape, number, dtype=dtype, device=backend.device)
        ours, theirs = twins(backend, (30,), (4, 5))
        oracle.assert_same_bits(backend.clip_grad_norm_(ours, limit), backend.clip_grad_norm_(theirs, number))
        assert_same_grads(ours, theirs)
        norm = torch.tensor(5.0, device=backend.device)
        backend.clip_grads_with_norm_(ours, limit, norm)
        backend.clip_grads_with_norm_(theirs, number, norm)
        assert_same_grads(ours, theirs)


def test_function_of_the_norm(backend: Target) -> None:
    """A limit that follows from the norm itself, as adaptive rules have it."""
    ours, theirs = twins(backend, (30,), (4, 5))
    norm = backend.clip_grad_norm_(ours, lambda n: n / 4)
    backend.clip_grads_with_norm_(theirs, (norm / 4).item(), norm)
    assert_same_grads(ours, theirs)


def test_function_cannot_change_the_result(backend: Target) -> None:
    params = backend.parameters((30,))
    before = clones(grads_of(params))
    norm = backend.clip_grad_norm_(params, lambda n: n.zero_() + 0.5)
    oracle.assert_norm(norm, before, 2.0)
    oracle.assert_scaled(grads_of(params), before, norm, 0.5)


@pytest.mark.parametrize("wrap", [torch.tensor, float], ids=["tensor", "number"])
def test_values_that_nobody_checks(backend: Target, wrap: Callable[[float], Any]) -> None:
    """A NaN acts as a NaN norm; inf scales nothing, not even by a NaN norm."""
    params = backend.parameters((5,), (2, 2))
    backend.clip_grad_norm_(params, lambda n: wrap(INF))
    backend.clip_grad_norm_(params, lambda n: wrap(NAN))
    assert all(g.isnan().all() for g in grads_of(params))
    params = backend.parameters((5,), (2, 2))
    params[0].grad[2] = NAN
    before = clones(grads_of(params))
    assert backend.clip_grad_norm_(params, lambda n: wrap(INF)).isnan()
    for grad, old in zip(grads_of(params), before):
        oracle.assert_within_ulps(grad, old, 0)
        if backend.name != "foreach" or backend.device == "cpu":  # a GPU's NaN times 1 is another NaN
            oracle.assert_same_bits(grad, old)


def test_negative_answers(backend: Target) -> None:
    """An error where the host can see it; what only an accelerator knows acts as 0."""
    params = backend.parameters((5,), (2, 2))
    for per_tensor in (False, True):
        for answer in (lambda n: -2.0, lambda n: torch.full_like(n, -2.0, device="cpu")):
            raises_untouched(
                ValueError,
                ("max_norm returned -2.0", "return 0 or more"),
                params,
                lambda per_tensor=per_tensor, answer=answer: backend.clip_grad_norm_(
                    params, answer, per_tensor=per_tensor
                ),
            )
    if backend.device != "cpu":
        backend.clip_grad_norm_(params, lambda n: torch.full_like(n, -2.0))
        assert all((g == 0).all() for g in grads_of(params))


def test_function_is_not_called_without_gradients(backend: Target) -> None:
    def never(norm: Tensor) -> float:
        raise AssertionError("called")

    for empty in ([], [torch.nn.Parameter(torch.ones(2))]):
        oracle.assert_same_bits(backend.clip_grad_norm_(empty, never), torch.tensor(0.0))


def test_module_is_a_function(backend: Target) -> None:
    class Half(torch.nn.Module):
        def forward(self, norm: Tensor) -> Tensor:
            return norm / 2

    params = backend.parameters((5,))
    before = clones(grads_of(params))
    norm = backend.clip_grad_norm_(params, Half())
    oracle.assert_scaled(grads_of(params), before, norm, (norm / 2).item())


def test_limit_that_requires_grad(backend: Target) -> None:
    params = backend.parameters((5,))
    grads_of(params)[0].fill_(1.0)  # whose norm is above the limit
    before = clones(grads_of(params))
    limit = torch.tensor(0.5, device=backend.device, requires_grad=True)
    for given in (limit, lambda n: limit):
        norm = backend.clip_grad_norm_(params, given)
        assert not params[0].grad.requires_grad and not norm.requires_grad
    assert params[0].grad.norm() < before[0].norm()


BAD_LIMITS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "vector": (torch.ones(3), ValueError, (r"shape \(3,\)", "max_norm", "per_tensor=True")),
    "matrix": (torch.ones(2, 2), ValueError, (r"shape \(2, 2\)", "max_norm", "number")),
    "complex tensor": (torch.tensor(1j), TypeError, ("max_norm", "number")),
    "negative tensor": (torch.tensor(-1.0), ValueError, ("max_norm", "0 or more", "-1")),
    "bool tensor": (torch.tensor(False), TypeError, ("max_norm", "torch.bool", "skip_step_")),
    "list": ([1.0, 2.0], TypeError, ("max_norm", "one number")),
    "detector": (gradclip_ext.thresholds.SpikeDetector(), TypeError, ("returned a bool", "SpikeDetector")),
    "function of bool": (lambda n: bool(n.is_cpu), TypeError, ("returned a bool", "largest allowed norm")),
    "function of text": (lambda n: "much", TypeError, ("max_norm returned 'much'", "one norm", "number")),
    "function of None": (lambda n: None, TypeError, ("max_norm returned None", "one norm", "number")),
    "function of a vector": (lambda n: torch.ones(2), ValueError, (r"shape \(2,\)", "one norm", "number")),
    "function of complex": (lambda n: torch.tensor(1j), TypeError, ("complex64", "real")),
}


@pytest.mark.parametrize("kind", BAD_LIMITS)
def test_bad_limits(backend: Target, kind: str) -> None:
    limit, error, words = BAD_LIMITS[kind]
    params = backend.parameters((3,), (2, 2))
    raises_untouched(error, words, params, lambda: backend.clip_grad_norm_(params, limit), what=kind)


def test_function_needs_a_norm(backend: Target) -> None:
    params, norm = backend.parameters((3,)), torch.tensor(1.0, device=backend.device)
    raises_untouched(
        TypeError,
        ("max_norm", "function", "call it with the norm"),
        params,
        lambda: backend.clip_grads_with_norm_(params, lambda n: 1.0, norm),
    )


def test_errors_of_the_function_come_through(backend: Target) -> None:
    def fails(norm: Tensor) -> float:
        raise KeyError("state")

    params = backend.parameters((3,), (2, 2))
    raises_untouched(KeyError, ("state",), params, lambda: backend.clip_grad_norm_(params, fails))


def test_nan_limit_with_error_if_nonfinite(backend: Target) -> None:
    params = backend.parameters((3,), (2, 2))
    raises_untouched(
        RuntimeError,
        ("max_norm is NaN", "error_if_nonfinite=False"),
        params,
        lambda: backend.clip_grad_norm_(params, lambda n: n * NAN, error_if_nonfinite=True),
    )


# ---------------------------------------------------------------- one norm or limit for each parameter


def with_gaps(grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return parameters, some without a gradient and one listed twice, and each of them once."""
    params: list[Tensor] = [parameter(g) for g in grads]
    frozen = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    once = [frozen[0], *params[:1], frozen[1], frozen[2], *params[1:]]
    return [*once, params[0]], once


def vector(backend: Target, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (random(size).abs() + 0.1).to(device=backend.device, dtype=dtype)


@over_dtypes
def test_vectors_scale_each_as_alone(backend: Target, dtype: torch.dtype) -> None:
    for layout, container, grads in layout_cases(dtype=dtype, device=backend.device):
        listed, once = with_gaps(grads)
        copies = clones(grads)
        outside = [oracle.gaps(g) for g in grads]
        norms, limits = vector(backend, len(once)), vector(backend, len(once))
        one = norms[0].reshape(1)
        for max_norm, total_norm in ((limits, norms), (0.3, norms), (limits, one), (limits.double(), norms)):
            backend.clip_grads_with_norm_(listed, max_norm, total_norm)
            with_grad = [i for i, p in enumerate(once) if p.grad is not None]
            for index, copy in zip(with_grad, copies, strict=True):
                limit = max_norm[index].item() if isinstance(max_norm, Tensor) else max_norm
                norm = total_norm[index if len(total_norm) > 1 else 0]
                backend.clip_grads_with_norm_([parameter(copy)], limit, norm)
                # On an accelerator torch multiplies lists and single tensors by different kernels.
                oracle.assert_within_ulps(once[index].grad, copy, 0 if backend.sees_values else 1, layout)
        for grad, old in zip(grads, outside):
            oracle.assert_same_bits(oracle.gaps(grad), old, f"{layout}, {container}: gaps")


def test_vectors_over_many_chunks_and_threads(backend: Target) -> None:
    params = backend.parameters((300_000,), (5,), (70_001,), (3,), (400_000,))
    before = clones(grads_of(params))
    norms = torch.tensor([2.0, 4.0, 0.5, INF, 8.0], device=backend.device)
    backend.clip_grads_with_norm_(params, 1.0, norms)
    for param, old, norm in zip(params, before, norms):
        oracle.assert_scaled([param.grad], [old], norm, 1.0)


def test_vectors_of_special_norms(backend: Target) -> None:
    params = backend.parameters((3,), (3,), (3,), (3,))
    before = clones(grads_of(params))
    norms = torch.tensor([NAN, INF, 0.0, 2.0], device=backend.device)
    backend.clip_grads_with_norm_(params, 1.0, norms)
    assert params[0].grad.isnan().all() and (params[1].grad == 0).all()
    oracle.assert_same_bits(params[2].grad, before[2])
    oracle.assert_scaled([params[3].grad], [before[3]], norms[3], 1.0)
    with oracle.unchanged(grads_of(params)):
        backend.clip_grads_with_norm_(params, torch.full((4,), INF, device=backend.device), norms)


def test_vectors_and_shared_memory(backend: Target) -> None:
    """Memory that two parameters share is scaled once, by the first one's norm; overlaps in list order."""
    base = backend.random(6)
    before = base.clone()
    params = [parameter(base), parameter(backend.random(2)), parameter(base)]
    backend.clip_grads_with_norm_(params, 1.0, torch.tensor([2.0, 1.0, 4.0], device=backend.device))
    oracle.assert_scaled([base], [before], torch.tensor(2.0), 1.0)
    base = backend.random(6)
    expected = base.clone()
    norms = torch.tensor([2.0, 4.0], device=backend.device)
    backend.clip_grads_with_norm_([parameter(base[:4]), parameter(base[2:])], 1.0, norms)
    expected[:4] *= oracle.coefficient(norms[0], 1.0)
    expected[2:] *= oracle.coefficient(norms[1], 1.0)
    oracle.assert_within_ulps(base.cpu(), expected.cpu(), 1)


def test_vectors_bump_versions(backend: Target) -> None:
    params = backend.parameters((3,), (0,), (2,))
    versions = [p.grad._version for p in params]
    backend.clip_grads_with_norm_(params, 1.0, torch.tensor([9.0, 9.0, 0.0], device=backend.device))
    assert all(p.grad._version > v for p, v in zip(params, versions))


@pytest.mark.parametrize("name", ["max_norm", "total_norm"])
@pytest.mark.parametrize("size", [0, 2, 4])
def test_vectors_of_another_length(backend: Target, name: str, size: int) -> None:
    params, wrong = backend.parameters((3,), (2, 2), (1,)), torch.ones(size, device=backend.device)
    good = torch.ones((), device=backend.device)
    arguments = {"max_norm": (wrong, good), "total_norm": (1.0, wrong)}[name]
    raises_untouched(
        ValueError,
        (name, "one element", rf"\({size},\)"),
        params,
        lambda: backend.clip_grads_with_norm_(params, *arguments),
    )


def test_vectors_with_a_negative_limit(backend: Target) -> None:
    params = backend.parameters((3,), (2, 2))
    limits, norms = torch.tensor([1.0, -1.0]), torch.ones(2, device=backend.device)
    raises_untouched(
        ValueError,
        ("max_norm", "0 or more", "at 1"),
        params,
        lambda: backend.clip_grads_with_norm_(params, limits, norms),
    )


# ---------------------------------------------------------------- zero_if_nonfinite


@over_dtypes
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_nonfinite_gradients_become_zero(backend: Target, value: float, dtype: torch.dtype) -> None:
    for max_norm in (0.0, 1.0, INF, lambda n: n * NAN, lambda n: torch.full_like(n, INF)):
        for layout, container, grads in layout_cases(dtype=dtype, device=backend.device):
            if not grads[0].numel():
                continue
            grads[0][(0,) * grads[0].dim()] = value
            spoiled = parameter(torch.full((3,), value, dtype=dtype, device=backend.device))
            params, outside = [*map(parameter, grads), spoiled], [oracle.gaps(g) for g in grads]
            versions = [p.grad._version for p in params]
            norm = backend.clip_grad_norm_(params, max_norm, zero_if_nonfinite=True)
            assert not norm.isfinite()
            for grad in grads_of(params):
                oracle.assert_same_bits(grad, torch.zeros_like(grad), f"{layout}, {container}")
            assert all(p.grad._version > v for p, v in zip(params, versions))
            for grad, old in zip(grads, outside):
                oracle.assert_same_bits(oracle.gaps(grad), old, f"{layout}, {container}: gaps")


def test_finite_norms_are_not_zeroed(backend: Target) -> None:
    for max_norm in (0.0, 0.3, 1e6, INF, lambda n: n / 3):
        ours, theirs = twins(backend, (30,), (4, 5), (0,))
        options: dict[str, Any] = {"norm_type": 2.0}
        norm = backend.clip_grad_norm_(ours, max_norm, zero_if_nonfinite=True, **options)
        oracle.assert_same_bits(norm, backend.clip_grad_norm_(theirs, max_norm, **options))
        assert_same_grads(ours, theirs)


def test_zero_over_many_chunks_and_threads(backend: Target) -> None:
    params = backend.parameters((300_000,), (5,), (70_001,))
    params[1].grad[3] = NAN
    backend.clip_grad_norm_(params, 1.0, zero_if_nonfinite=True)
    for grad in grads_of(params):
        oracle.assert_same_bits(grad, torch.zeros_like(grad))


def test_zero_with_a_norm_from_elsewhere(backend: Target) -> None:
    for max_norm in (1.0, INF):
        params = backend.parameters((3,), (2, 2), (4,))
        before = clones(grads_of(params))
        norms = torch.tensor([2.0, NAN, INF], device=backend.device)
        backend.clip_grads_with_norm_(params, max_norm, norms, zero_if_nonfinite=True)
        oracle.assert_scaled([params[0].grad], before[:1], norms[0], max_norm)
        for grad in grads_of(params)[1:]:
            oracle.assert_same_bits(grad, torch.zeros_like(grad))
        backend.clip_grads_with_norm_(params, max_norm, norms[1], zero_if_nonfinite=True)
        oracle.assert_same_bits(params[0].grad, torch.zeros_like(params[0].grad))


def test_zero_and_error_exclude_each_other(backend: Target) -> None:
    params = backend.parameters((3,))
    raises_untouched(
        ValueError,
        ("error_if_nonfinite=True", "zero_if_nonfinite=True", "pass one"),
        params,
        lambda: backend.clip_grad_norm_(params, 1.0, error_if_nonfinite=True, zero_if_nonfinite=True),
    )


def test_zero_of_sparse_gradients() -> None:
    grad = torch.sparse_coo_tensor([[0, 2]], [1.0, NAN], (4,))
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = grad
    gradclip_ext.clip_grads_with_norm_(param, 1.0, torch.tensor(NAN), zero_if_nonfinite=True)
    oracle.assert_same_bits(param.grad.to_dense(), torch.zeros(4))
