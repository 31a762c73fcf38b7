"""A parameter listed twice, gradients that share memory, neighbours in one buffer."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import Target, clones, grads_of
from oracle import parameter


def test_a_parameter_listed_twice_counts_once(backend: Target) -> None:
    """A tied weight. torch counts and scales it twice."""
    for name, call in backend.calls().items():
        params = backend.parameters((3,), (2, 2))
        twins = [parameter(g.clone()) for g in grads_of(params)]
        results = call([params[0], params[0], params[1], params[0], params[1]]), call(twins)
        if results[0] is not None:
            oracle.assert_same_bits(*results, what=name)
        for grad, twin in zip(grads_of(params), grads_of(twins)):
            oracle.assert_same_bits(grad, twin, name)


def test_parameters_that_share_a_gradient_both_count_and_its_memory_is_written_once(backend: Target) -> None:
    """autograd.grad of a + b returns one tensor twice. torch scales it twice."""
    for name, call in backend.calls().items():
        params = backend.parameters((3,), (2, 2))
        before = clones(grads_of(params))
        same = parameter(params[1].grad)  # another parameter with the same gradient
        alias = parameter(params[0].grad.view(3))  # another tensor object: same pointer, shape, strides
        shares = [params[0], params[1], same, alias]
        twins = [parameter(g) for g in (*clones(before), *clones(before[::-1]))]
        results = call(shares), call(twins)
        if results[0] is not None:
            oracle.assert_norm(results[0], [*before, *before], math.inf if "inf" in name else 2.0, name)
            oracle.assert_scaled(grads_of(params), before, results[0], 0.1, name)
        else:
            for grad, twin in zip(grads_of(params), grads_of(twins)):
                oracle.assert_same_bits(grad, twin, name)


def test_a_shared_gradient_beside_a_parameter_listed_twice(backend: Target) -> None:
    (a, b), c = backend.parameters((5,), (4,)), None
    before = clones([a.grad, b.grad])
    c = parameter(a.grad)
    norm = backend.clip_grad_norm_([a, b, a, c, b, c], 0.25)
    oracle.assert_norm(norm, [*before, before[0]], 2.0)
    oracle.assert_scaled([a.grad, b.grad], before, norm, 0.25)


def test_get_total_norm_counts_every_tensor(backend: Target) -> None:
    a, b = backend.random(3), backend.random(4)
    for norm_type in (0.0, 1.0, 2.0, math.inf):
        listed = [a, b, a, b.view(4), a.detach()]
        oracle.assert_norm(backend.get_total_norm(listed, norm_type), clones(listed), norm_type)


def test_same_memory_in_another_shape_or_dtype_is_no_duplicate(backend: Target) -> None:
    a = backend.random(6)
    for other in (a.view(2, 3), a[:3], a[::2], a.view(2, 3).t()):
        norm = backend.get_total_norm([a, other])
        oracle.assert_norm(norm, [a, other.clone()], 2.0)


def test_shared_memory_in_another_shape_is_written_once(backend: Target) -> None:
    """As autograd.grad returns it for a + b.view(2, 3), or a + b.t(): views of one tensor."""
    for name, call in backend.calls().items():
        a = backend.random(2, 3)
        for other in (a.view(6), a.t(), a.view(3, 1, 2)):
            before = a.clone()
            twins = [parameter(before.clone()), parameter(before.view(6).clone())]
            results = call([parameter(a), parameter(other)]), call(twins)
            if results[0] is not None:
                oracle.assert_norm(results[0], [before, before], math.inf if "inf" in name else 2.0, name)
                oracle.assert_scaled([a], [before], results[0], 0.1, name)
            else:
                oracle.assert_same_bits(a, twins[0].grad, name)


def test_zero_size_gradients_are_never_duplicates(backend: Target) -> None:
    base = backend.random(4)
    params = [parameter(t) for t in (base[:0], base, base[:0], base[4:], base[:0].clone())]
    before = base.clone()
    norm = backend.clip_grad_norm_(params, 0.5)
    oracle.assert_norm(norm, [before], 2.0)
    oracle.assert_scaled([base], [before], norm, 0.5)


@pytest.mark.parametrize(
    "cut", [(slice(0, 6), slice(4, 10)), (slice(0, 10, 2), slice(0, 10, 3)), (slice(0, 10), slice(2, 5))]
)
def test_partial_overlap_is_scaled_in_list_order_as_in_torch(backend: Target, cut: tuple) -> None:
    ours = backend.random(10)
    theirs = ours.cpu().clone()  # torch's fused GPU kernels scale overlapping tensors at the same time
    lists = [[parameter(base[c]) for c in cut] for base in (ours, theirs)]
    expected = [p.grad.clone() for p in lists[0]]
    norm = backend.clip_grad_norm_(lists[0], 0.25)
    oracle.assert_norm(norm, expected, 2.0)
    torch.nn.utils.clip_grads_with_norm_(lists[1], 0.25, norm.cpu())
    oracle.assert_within_ulps(ours.cpu(), theirs, 1)


def test_gradients_in_one_flat_buffer(backend: Target) -> None:
    """Neighbours that touch without overlapping, as data-parallel wrappers lay them out."""
    for dtype in (torch.float32, torch.bfloat16):
        flat = backend.random(103, dtype=dtype)
        before = flat.clone()
        params = [parameter(t) for t in (flat[1:41].view(8, 5), flat[41:42], flat[42:60].view(6, 3).t())]
        norm = backend.clip_grad_norm_(params, 0.5)
        oracle.assert_norm(norm, [before[1:60]], 2.0)
        oracle.assert_scaled([flat[1:60]], [before[1:60]], norm, 0.5)
        oracle.assert_same_bits(flat[0], before[0])
        oracle.assert_same_bits(flat[60:], before[60:])


def test_tied_weight_of_a_model(backend: Target) -> None:
    embed, head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
    head.weight = embed.weight
    model = torch.nn.ModuleList([embed, head]).to(backend.device)
    head(embed(torch.arange(7, device=backend.device))).pow(2).sum().backward()
    before = embed.weight.grad.clone()
    norm = backend.clip_grad_norm_([*embed.parameters(), *head.parameters(), *model.parameters()], 0.5)
    oracle.assert_norm(norm, [before], 2.0)
    oracle.assert_scaled([embed.weight.grad], [before], norm, 0.5)
