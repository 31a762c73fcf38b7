"""Gradients of unusual kinds that torch takes: sparse, lazy bits, complex32, dual, without memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from cases import NORM_TYPES, Target, clones, name_of, over_dtypes, raises_untouched, random
from oracle import parameter
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import clip_grad_norm_ as torch_clip_grad_norm_
from torch.nn.utils import clip_grad_value_ as torch_clip_grad_value_
from torch.nn.utils import clip_grads_with_norm_ as torch_clip_grads_with_norm_

import gradclip_ext

over_foreach = pytest.mark.parametrize("foreach", [None, True, False])


# ---------------------------------------------------------------- complex32


@over_foreach
@pytest.mark.parametrize("norm_type", [*NORM_TYPES, -1.0], ids=name_of)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex32(norm_type: float, foreach: bool | None) -> None:
    grads = [random(n, dtype=torch.complex64).to(torch.complex32) for n in (70, 3)] + [random(4)]
    before = clones(grads)
    norm = gradclip_ext.clip_grad_norm_([parameter(g) for g in grads], 0.5, norm_type, foreach=foreach)
    exact = oracle.reference.total_norm([g.to(torch.complex64) for g in before], norm_type)
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact, rel=1e-6)
    coef = oracle.coefficient(norm, 0.5).double()
    for grad, old in zip(map(oracle.real, grads), map(oracle.real, before)):
        oracle.assert_within_ulps(grad, (old.double() * coef).to(old.dtype), 1)


@over_foreach
def test_complex32_and_a_small_coefficient(foreach: bool | None) -> None:
    """torch rounds the coefficient to float16, which has hardly any number near 1e-6."""
    grads = [random(50, dtype=torch.complex64).mul(1e3).to(torch.complex32)]
    if foreach is False:
        grads.append(grads[0].clone().conj())
    before = [oracle.real(g).clone() for g in grads]
    gradclip_ext.clip_grads_with_norm_([parameter(g) for g in grads], 1e-6, torch.tensor(1.0), foreach)
    for grad, old in zip(map(oracle.real, grads), before):
        oracle.assert_within_ulps(grad, (old.double() * 1e-6 / (1 + 1e-6)).to(old.dtype), 1)


# ---------------------------------------------------------------- sparse and mkldnn


SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": Tensor.to_sparse_coo,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
    "bsr": lambda t: t.to_sparse_bsr((2, 3)),
    "bsc": lambda t: t.to_sparse_bsc((2, 3)),
    "mkldnn": Tensor.to_mkldnn,
}


def holding(grad: Tensor) -> Tensor:
    """Return a parameter with a gradient of any layout."""
    param = torch.nn.Parameter(grad.clone())
    param.grad = grad
    return param


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta state")
@over_foreach
@over_dtypes
@pytest.mark.parametrize("layout", SPARSE)
def test_sparse_gradients_scaled_by_a_known_norm(
    layout: str, dtype: torch.dtype, foreach: bool | None
) -> None:
    """How users clip a sparse embedding: a norm of their own, then clip_grads_with_norm_."""
    if layout == "mkldnn" and (dtype != torch.float32 or not torch.backends.mkldnn.is_available()):
        pytest.skip("mkldnn tensors are float32 here, or not built")
    dense = random(4, 6, dtype=dtype) * (torch.rand(4, 6) < 0.6)
    for max_norm in (0.5, 50.0):
        lists = [[SPARSE[layout](dense.clone()), random(3), dense.clone()] for _ in range(2)]
        lists[1][1] = lists[0][1].clone()
        norm = torch.tensor(3.0)
        gradclip_ext.clip_grads_with_norm_([holding(g) for g in lists[0]], max_norm, norm, foreach)
        torch_clip_grads_with_norm_([holding(g) for g in lists[1]], max_norm, norm, foreach)
        for one, other in zip(*lists):
            assert one.layout is other.layout
            # Multiplying by 1 changes signs of zeros in some layouts; where nothing is clipped we do not.
            values = oracle.real(one.to_dense()), oracle.real(other.to_dense())
            oracle.assert_within_ulps(*values, 0 if max_norm == 50.0 else 1, f"max_norm={max_norm}")


def test_a_sparse_embedding(backend: Target) -> None:
    """Indices that occur twice: the gradient of backward is not coalesced."""
    embeddings = [torch.nn.Embedding(7, 3, sparse=True) for _ in range(2)]
    embeddings = [e.to(backend.device) for e in embeddings]
    weights = backend.random(4, 3)
    for embedding in embeddings:
        (embedding(torch.tensor([1, 4, 1, 6], device=backend.device)) * weights).sum().backward()
    norm = embeddings[0].weight.grad.coalesce().values().norm()
    backend.clip_grads_with_norm_(embeddings[0].parameters(), 0.25, norm)
    torch_clip_grads_with_norm_(embeddings[1].parameters(), 0.25, norm)
    ours, theirs = (e.weight.grad.coalesce() for e in embeddings)
    oracle.assert_within_ulps(ours.values().cpu(), theirs.values().cpu(), 1)
    assert ours.values().norm().item() == pytest.approx(0.25, rel=1e-5)


# ---------------------------------------------------------------- lazy conjugates and negatives

LAZY: dict[str, Callable[[], Tensor]] = {
    "conjugate": lambda: random(5, dtype=torch.complex64).conj(),
    "imaginary part of a conjugate": lambda: random(5, dtype=torch.complex64).conj().imag,
    "negative": lambda: torch._neg_view(random(5)),
}


@pytest.mark.parametrize("norm_type", NORM_TYPES, ids=name_of)
@pytest.mark.parametrize("kind", LAZY)
def test_lazy_bits_one_tensor_at_a_time(kind: str, norm_type: float) -> None:
    """torch works with foreach=False only; so do we."""
    lazy = LAZY[kind]()
    plain = [lazy.resolve_conj().resolve_neg().clone(), random(3)]
    grads = [lazy, plain[1].clone()]
    norm = gradclip_ext.clip_grad_norm_([parameter(g) for g in grads], 0.5, norm_type, foreach=False)
    oracle.assert_norm(norm, plain, norm_type)
    assert grads[0].is_conj() == lazy.is_conj() and grads[0].is_neg() == lazy.is_neg()
    oracle.assert_scaled([g.resolve_conj().resolve_neg() for g in grads], plain, norm, 0.5)
    twin = parameter(LAZY[kind]())
    twin.grad.copy_(plain[0])
    torch_clip_grads_with_norm_([twin], 0.5, norm, foreach=False)
    one, other = (g.resolve_conj().resolve_neg() for g in (lazy, twin.grad))
    oracle.assert_within_ulps(oracle.real(one), oracle.real(other), 1)


@pytest.mark.parametrize("kind", LAZY)
def test_lazy_bits_are_zeroed_one_tensor_at_a_time(kind: str) -> None:
    """A NaN in another gradient."""
    grads = [torch.tensor([math.nan, 1.0]), LAZY[kind]()]
    params = [parameter(g) for g in grads]
    gradclip_ext.clip_grad_norm_(params, 1.0, foreach=False, zero_if_nonfinite=True)
    for grad in grads:
        assert not grad.resolve_conj().resolve_neg().count_nonzero()


@pytest.mark.parametrize("kind", [k for k in LAZY if k != "conjugate"])
def test_lazy_negatives_clamped_one_at_a_time(kind: str) -> None:
    ours, theirs = LAZY[kind](), LAZY[kind]()
    theirs.copy_(ours)
    expected = ours.clone().clamp(-0.2, 0.2)
    gradclip_ext.clip_grad_value_([parameter(ours)], 0.2, foreach=False)
    torch_clip_grad_value_([parameter(theirs)], 0.2, foreach=False)
    oracle.assert_same_bits(ours.resolve_neg(), expected)
    oracle.assert_same_bits(theirs.resolve_neg(), expected)


def test_dense_lazy_negatives_are_clamped_right_or_refused(backend: Target) -> None:
    """Memory holds the negated values, which bounds that are not symmetric show."""
    calls: dict[tuple[float, float], Callable[[Any], Any]] = {
        (-0.1, 0.3): lambda ps: backend.clamp_grad_(ps, -0.1, 0.3),
        (-0.2, 0.2): lambda ps: backend.clip_grad_value_(ps, 0.2),
    }
    for bounds, call in calls.items():
        lazy, other = torch._neg_view(backend.random(30)), backend.random(4)
        before, clamped = lazy.clone().resolve_neg(), lazy.clone().resolve_neg().clamp(*bounds)
        try:
            call([parameter(lazy), parameter(other)])
        except RuntimeError:
            words = ("gradient 1 ", "negative", r"resolve_neg\(\)")
            both = [parameter(other), parameter(lazy)]
            raises_untouched(RuntimeError, words, [parameter(other)], call, both)
            oracle.assert_same_bits(lazy.resolve_neg(), before)
        else:
            oracle.assert_same_bits(lazy.resolve_neg(), clamped)


# ---------------------------------------------------------------- without memory, from inference, dual


def zero_tensor() -> Tensor:
    return torch._efficientzerotensor((3,))


def test_zero_tensors_have_a_norm(backend: Target) -> None:
    if backend.device != "cpu":
        pytest.skip("torch makes them on the CPU here")
    other = backend.random(4)
    for norm_type in (0.0, 1.0, 2.0, math.inf):
        norm = backend.get_total_norm([zero_tensor(), other], norm_type)
        oracle.assert_norm(norm, [torch.zeros(3), other], norm_type)


def test_zero_tensors_are_refused_before_anything_changes(backend: Target) -> None:
    """They have no memory to write to: torch raises, too, but after other gradients were scaled."""
    for name, call in backend.calls().items():
        params = backend.parameters((3,), (2, 2))
        zero = torch.nn.Parameter(torch.ones(3))
        zero.grad = zero_tensor()
        for listed, place in (([*params, zero], 2), ([zero, *params], 0)):
            words = (f"gradient {place} ", "zero tensor", r"clone\(\)")
            raises_untouched(RuntimeError, words, params, call, listed, what=name)


def test_inference_tensors_may_be_read_anywhere(backend: Target) -> None:
    with torch.inference_mode():
        tensors = [backend.random(5), backend.random(2, 3)]
    oracle.assert_norm(backend.get_total_norm(tensors), tensors, 2.0)


def test_inference_tensors_are_clipped_inside_the_mode(backend: Target) -> None:
    with torch.inference_mode():
        grads = [backend.random(5), backend.random(8)[::2]]
        before = clones(grads)
        norm = backend.clip_grad_norm_([parameter(g) for g in grads], 0.5)
        oracle.assert_scaled(grads, before, norm, 0.5)


DUAL_CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "clip_grad_norm_": (
        lambda ps, **k: gradclip_ext.clip_grad_norm_(ps, 0.5, **k),
        lambda ps, **k: torch_clip_grad_norm_(ps, 0.5, **k),
    ),
    "clip_grads_with_norm_": (
        lambda ps, **k: gradclip_ext.clip_grads_with_norm_(ps, 0.5, torch.tensor(7.0), **k),
        lambda ps, **k: torch_clip_grads_with_norm_(ps, 0.5, torch.tensor(7.0), **k),
    ),
    "clip_grad_value_": (
        lambda ps, **k: gradclip_ext.clip_grad_value_(ps, 0.2, **k),
        lambda ps, **k: torch_clip_grad_value_(ps, 0.2, **k),
    ),
}


@pytest.mark.parametrize("name", DUAL_CALLS)
def test_tangents_of_dual_tensors(name: str) -> None:
    """Forward-mode AD: as torch, each tangent follows its gradient."""
    primal, tangent = random(6), random(6)
    found = []
    for call in DUAL_CALLS[name]:
        with forward_ad.dual_level():
            param = torch.nn.Parameter(torch.zeros(6))
            param.grad = forward_ad.make_dual(primal.clone(), tangent.clone())
            result = call([param], foreach=False)
            duals = [param.grad] if result is None else [param.grad, result]
            found.append([part for dual in duals for part in forward_ad.unpack_dual(dual)])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- what is no leaf


@pytest.mark.parametrize("gaps", [False, True])
def test_a_non_leaf_warns_once_a_call(backend: Target, gaps: bool) -> None:
    """torch warns when it reads its .grad; one warning is enough, on every code path."""
    calls = backend.calls()
    calls["error_if_nonfinite"] = lambda ps: backend.clip_grad_norm_(ps, 0.1, error_if_nonfinite=True)
    for name, call in calls.items():
        leaf = parameter(backend.random(8)[::2] if gaps else backend.random(4))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call([leaf, leaf * 2])
        assert len([w for w in caught if "not a leaf" in str(w.message)]) == 1, name
        others = [str(w.message) for w in caught if w.category is UserWarning]
        assert len(others) == 1, others
