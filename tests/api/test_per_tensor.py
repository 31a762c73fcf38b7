"""clip_grad_norm_(per_tensor=True): each gradient by its own norm, as one call for each would do it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
from cases import (
    CONTAINERS,
    Target,
    clones,
    grads_of,
    layout_cases,
    over_dtypes,
    over_norm_types,
    raises_untouched,
)
from oracle import parameter
from torch import Tensor

import gradclip_ext
from gradclip_ext import reference

NAN, INF = math.nan, math.inf


def one_by_one(
    backend: Target, grads: Sequence[Tensor], max_norm: Any, norm_type: float = 2.0, **options: Any
) -> list[Tensor]:
    """Clip each gradient by a call of its own; return the norms."""
    limits = max_norm if isinstance(max_norm, list) else [max_norm] * len(grads)
    return [
        backend.clip_grad_norm_([parameter(g)], limit, norm_type, **options)
        for g, limit in zip(grads, limits, strict=True)
    ]


def assert_alike(backend: Target, ours: Sequence[Tensor], theirs: Sequence[Tensor], what: str = "") -> None:
    """Assert the same bits, or a few ulp where torch's list operations are not those for a single tensor:
    a float64 norm rounds in another order, and its coefficient and product with it."""
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        where = f"{what}, tensor {index}"
        if backend.sees_values:
            oracle.assert_same_bits(one, other, where)
        else:
            oracle.assert_within_ulps(one.cpu(), other.cpu(), 4 if one.dtype == torch.float64 else 1, where)


# ---------------------------------------------------------------- against one call for each


@over_norm_types
@over_dtypes
def test_as_one_call_for_each(backend: Target, dtype: torch.dtype, norm_type: float) -> None:
    for max_norm in (0.0, 2.0, INF):
        for layout, container, grads in layout_cases(dtype=dtype, device=backend.device):
            # with the same gaps, so that the same backend takes them
            copies = [
                oracle.whole_storage(g).clone().as_strided(g.shape, g.stride(), g.storage_offset())
                for g in grads
            ]
            before, outside = clones(grads), [oracle.gaps(g) for g in grads]
            params = CONTAINERS[container]([parameter(g) for g in grads])
            norms = backend.clip_grad_norm_(params, max_norm, norm_type, per_tensor=True)
            expected = one_by_one(backend, copies, max_norm, norm_type)
            what = f"{layout}, {container}, max_norm={max_norm}"
            assert norms.shape == (len(grads),) and not norms.requires_grad, what
            for norm, old in zip(norms, before):
                oracle.assert_norm(norm, [old], norm_type, what)
            assert_alike(backend, [*norms, *grads], [*expected, *copies], what)
            for grad, old in zip(grads, outside):
                oracle.assert_same_bits(oracle.gaps(grad), old, f"{what}: gaps")


def test_every_second_parameter_without_gradient(backend: Target) -> None:
    """Results for each parameter, and limits of each, have gaps in many places."""
    params = backend.parameters(*[(3 + i,) for i in range(40)])
    for param in params[::2]:
        param.grad = None
    twins = [parameter(p.grad.clone()) for p in params[1::2]]
    limits = torch.rand(40, device=backend.device)
    norms = backend.clip_grad_norm_(params, limits, per_tensor=True)
    expected = backend.clip_grad_norm_(twins, limits[1::2].contiguous(), per_tensor=True)
    oracle.assert_same_bits(norms[1::2], expected)
    assert (norms[::2] == 0.0).all()
    for param, twin in zip(params[1::2], twins):
        oracle.assert_same_bits(param.grad, twin.grad)
    assert backend.get_grad_stats(params).norms[::2].count_nonzero() == 0


def test_against_the_reference(backend: Target) -> None:
    grads = [backend.random(50), backend.random(7, 5) * 30, backend.random() / 50, backend.random(0)]
    exact = reference.norms(grads)
    before = clones(grads)
    norms = backend.clip_grad_norm_([parameter(g) for g in grads], 1.0, per_tensor=True)
    torch.testing.assert_close(norms.cpu().double(), torch.tensor(exact).double(), rtol=1e-6, atol=0.0)
    for grad, old, norm in zip(grads, before, exact):
        expected = reference.scale([old], reference.clip_coef(1.0, norm))[0]
        torch.testing.assert_close(oracle.wide(grad), expected, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, INF])
def test_many_chunks_and_threads(backend: Target, norm_type: float) -> None:
    """Tensors for one thread, and larger ones for all of them together."""
    shapes = [(300_000,), (5,), (70_001,), (700, 701), (3,), *[(20_000,)] * 30]
    grads = [backend.random(*shape) * 10.0 ** (i % 5 - 3) for i, shape in enumerate(shapes)]
    copies = clones(grads)
    norms = backend.clip_grad_norm_([parameter(g) for g in grads], 10.0, norm_type, per_tensor=True)
    expected = one_by_one(backend, copies, 10.0, norm_type)
    assert_alike(backend, [*norms, *grads], [*expected, *copies])


def test_values_beyond_the_range_of_squares(backend: Target) -> None:
    grads = [
        torch.full((9,), value, dtype=torch.float64, device=backend.device)
        for value in (1e200, 1e-200, 0.0, 3.0, 5e-324)
    ]
    copies = clones(grads)
    norms = backend.clip_grad_norm_([parameter(g) for g in grads], 1.0, per_tensor=True)
    expected = one_by_one(backend, copies, 1.0)
    if backend.sees_values:  # elsewhere torch's own operations square in float64
        assert norms[0] == pytest.approx(3e200, rel=1e-6) and norms[1] == pytest.approx(3e-200, rel=1e-6)
    assert_alike(backend, [*norms, *grads], [*expected, *copies])


def test_mixed_dtypes(backend: Target) -> None:
    """One dtype for all norms: float64 as soon as one gradient is."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.complex64)
    grads = [backend.random(20, dtype=d) for d in dtypes]
    copies = clones(grads)
    norms = backend.clip_grad_norm_([parameter(g) for g in grads], 1.0, per_tensor=True)
    assert norms.dtype == torch.float32
    assert_alike(backend, [*norms, *grads], [*one_by_one(backend, copies, 1.0), *copies])
    grads.append(backend.random(4, dtype=torch.float64))
    before = clones(grads)
    norms = backend.clip_grad_norm_([parameter(g) for g in grads], 0.1, per_tensor=True)
    assert norms.dtype == torch.float64
    for grad, old, norm in zip(grads, before, norms):
        oracle.assert_scaled([grad], [old], norm, 0.1)


# ---------------------------------------------------------------- which parameter is which


def test_every_parameter_has_its_place(backend: Target) -> None:
    """In the order given, a tied one once, 0 without a gradient."""
    a, b, c = backend.parameters((4,), (2, 3), (0,))
    frozen, other = (torch.nn.Parameter(torch.ones(2, device=backend.device)) for _ in range(2))
    copies = clones(grads_of([a, b, c]))
    norms = backend.clip_grad_norm_([frozen, a, b, a, other, c, b], 0.5, per_tensor=True)
    expected = one_by_one(backend, copies, 0.5)
    zero = torch.zeros_like(norms[0])
    assert_alike(backend, norms, [zero, expected[0], expected[1], zero, expected[2]])
    assert_alike(backend, grads_of([a, b, c]), copies)


def test_nothing_to_clip(backend: Target) -> None:
    frozen = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    for params in ([], frozen):
        norms = backend.clip_grad_norm_(params, lambda norm: norm / 0, per_tensor=True)
        oracle.assert_same_bits(norms, torch.zeros(len(params)))


def test_only_empty_gradients(backend: Target) -> None:
    params = backend.parameters((0,), (3, 0))
    for norm_type in (2.0, INF, -INF, 0.0):
        norms = backend.clip_grad_norm_(params, 1.0, norm_type, per_tensor=True)
        assert norms.tolist() == [0.0, 0.0] and norms.device.type == backend.device


def test_shared_memory(backend: Target) -> None:
    """Both parameters have a norm; their memory is scaled once."""
    base = backend.random(6)
    copy = base.clone()
    params = [parameter(base), parameter(backend.random(2)), parameter(base)]
    norms = backend.clip_grad_norm_(params, 0.5, per_tensor=True)
    expected = one_by_one(backend, [copy], 0.5)
    assert_alike(backend, [norms[0], norms[2], base], [*expected, *expected, copy])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device: no CUDA here")
@pytest.mark.parametrize("order", [("cpu", "cuda"), ("cuda", "cpu")])
def test_two_devices(order: tuple[str, str]) -> None:
    grads = [torch.ones(3, device=order[i % 2]) * (i + 1) for i in range(5)]
    before = clones(grads)
    norms = gradclip_ext.clip_grad_norm_([parameter(g) for g in grads], 1.0, per_tensor=True)
    assert norms.device.type == order[0]
    for grad, old, norm in zip(grads, before, norms):
        oracle.assert_scaled([grad], [old], norm, 1.0)


# ---------------------------------------------------------------- limits


LIMITS: dict[str, Callable[[list[float], Tensor], Any]] = {
    "vector": lambda limits, like: like.new_tensor(limits),
    "float64 vector": lambda limits, like: like.new_tensor(limits, dtype=torch.float64),
    "function": lambda limits, like: lambda norms: norms.new_tensor(limits),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_a_limit_for_each(backend: Target, kind: str) -> None:
    params = backend.parameters((4,), (300,), (0,), (2, 3))
    copies = clones(grads_of(params))
    limits = [0.5, 2.0, 7.0, 1.0, INF]
    listed = [*params[:2], torch.nn.Parameter(torch.ones(2)), *params[2:]]
    norms = backend.clip_grad_norm_(listed, LIMITS[kind](limits, params[0].grad), per_tensor=True)
    assert norms.shape == (5,)
    expected = one_by_one(backend, copies, [0.5, 2.0, 1.0, INF])
    assert_alike(backend, [*norms[[0, 1, 3, 4]], *grads_of(params)], [*expected, *copies])


def test_function_gets_the_norms_of_all_parameters(backend: Target) -> None:
    params = backend.parameters((4,), (2, 3))
    copies = clones(grads_of(params))
    seen: list[Tensor] = []

    def rule(norms: Tensor) -> Tensor:
        seen.append(norms)
        return norms.median()

    norms = backend.clip_grad_norm_([torch.nn.Parameter(torch.ones(1)), *params], rule, per_tensor=True)
    oracle.assert_same_bits(seen[0], norms)
    assert len(seen) == 1 and norms[0] == 0.0
    limit = norms.median().item()
    assert_alike(backend, [*norms[1:], *grads_of(params)], [*one_by_one(backend, copies, limit), *copies])


@pytest.mark.parametrize("shape", [(1,), (), (1, 1)], ids=str)
def test_one_limit_in_a_tensor(backend: Target, shape: tuple[int, ...]) -> None:
    params = backend.parameters((4,), (2, 3))
    copies = clones(grads_of(params))
    limit = torch.full(shape, 0.5, device=backend.device)
    norms = backend.clip_grad_norm_(params, limit, per_tensor=True)
    assert_alike(backend, [*norms, *grads_of(params)], [*one_by_one(backend, copies, 0.5), *copies])


# ---------------------------------------------------------------- NaN and infinities


@pytest.mark.parametrize("max_norm", [0.0, 1.0, INF])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_nonfinite_values_stay_in_their_tensor(backend: Target, value: float, max_norm: float) -> None:
    grads = [backend.random(4), backend.random(300_000), backend.random(2, 3), backend.random(1)]
    grads[1][7] = value
    grads[2][1, 1] = value
    copies = clones(grads)
    norms = backend.clip_grad_norm_([parameter(g) for g in grads], max_norm, per_tensor=True)
    expected = one_by_one(backend, copies, max_norm)
    assert_alike(backend, [*norms, *grads], [*expected, *copies])
    assert norms.isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("max_norm", [0.1, INF])
def test_zero_if_nonfinite(backend: Target, max_norm: float) -> None:
    grads = [backend.random(4), backend.random(300_000), backend.random(2, 3)]
    grads[1][7], grads[2][0, 0] = NAN, INF
    copies = clones(grads)
    norms = backend.clip_grad_norm_(
        [parameter(g) for g in grads], max_norm, per_tensor=True, zero_if_nonfinite=True
    )
    expected = one_by_one(backend, copies, max_norm, zero_if_nonfinite=True)
    assert_alike(backend, [*norms, *grads], [*expected, *copies])
    assert not grads[1].any() and not grads[2].any()


def test_error_if_nonfinite(backend: Target) -> None:
    params = backend.parameters((4,), (3,), (2, 2))
    params[2].grad[1, 0] = INF
    listed = [torch.nn.Parameter(torch.ones(1)), *params]
    versions = [p.grad._version for p in params]
    raises_untouched(
        RuntimeError,
        ("non-finite", r"tensor 3 of the list, shape \(2, 2\)"),
        params,
        lambda: backend.clip_grad_norm_(listed, 0.1, error_if_nonfinite=True, per_tensor=True),
    )
    assert versions == [p.grad._version for p in params]
    params[2].grad[1, 0] = 1.0
    copies = clones(grads_of(params))
    backend.clip_grad_norm_(listed, 0.1, error_if_nonfinite=True, per_tensor=True)
    one_by_one(backend, copies, 0.1)
    assert_alike(backend, grads_of(params), copies)


# ---------------------------------------------------------------- bookkeeping and refusals


def test_versions_and_identity(backend: Target) -> None:
    params = backend.parameters((4,), (0,), (3,))
    grads, versions = grads_of(params), [p.grad._version for p in params]
    for max_norm in (INF, 1e9, 0.1):
        backend.clip_grad_norm_(params, max_norm, per_tensor=True)
        assert all(p.grad is g for p, g in zip(params, grads))
        assert all(p.grad._version > v for p, v in zip(params, versions))
        versions = [p.grad._version for p in params]


def test_unclipped_tensors_are_not_written(backend: Target) -> None:
    params = backend.parameters((4,), (300_000,))
    with oracle.unchanged(grads_of(params)):
        backend.clip_grad_norm_(params, 1e9, per_tensor=True)


BAD: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "three limits": ({"max_norm": torch.ones(3)}, ValueError, (r"\(3,\)", "2 parameters", "max_norm")),
    "no limits": ({"max_norm": torch.ones(0)}, ValueError, (r"\(0,\)", "2 parameters", "max_norm")),
    "matrix": ({"max_norm": torch.ones(2, 1)}, ValueError, (r"\(2, 1\)", "max_norm")),
    "negative": ({"max_norm": torch.tensor([1.0, -1.0])}, ValueError, ("0 or more", "at 1")),
    "NaN": ({"max_norm": torch.tensor([NAN, 1.0])}, ValueError, ("0 or more", "nan", "at 0")),
    "function": (
        {"max_norm": lambda n: n[:1].expand(3)},
        ValueError,
        (r"\(3,\)", "2 norms", r"shape \(2,\)"),
    ),
    "group": ({"max_norm": 1.0, "group": "tp"}, TypeError, ("group", "'tp'")),
    "copies": ({"max_norm": 1.0, "copies": lambda p: 1}, ValueError, ("copies", "group=")),
    "text": ({"max_norm": "much"}, ValueError, ("max_norm", "number", "much")),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments(backend: Target, kind: str) -> None:
    arguments, error, words = BAD[kind]
    params = backend.parameters((3,), (2, 2))
    raises_untouched(
        error, words, params, lambda: backend.clip_grad_norm_(params, **arguments, per_tensor=True), what=kind
    )


def test_bad_gradients(backend: Target) -> None:
    good = backend.parameters((3,))
    expanded = parameter(torch.ones(1, 3, device=backend.device).expand(2, 3))
    sparse = torch.nn.Parameter(torch.ones(3, device=backend.device))
    sparse.grad = torch.ones(3).to_sparse().to(backend.device)
    for bad, error, word in ((expanded, RuntimeError, "expanded"), (sparse, TypeError, "sparse")):
        raises_untouched(
            error, (word,), good, lambda bad=bad: backend.clip_grad_norm_([*good, bad], 1.0, per_tensor=True)
        )
