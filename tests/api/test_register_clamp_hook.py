"""register_clamp_hook: clamping inside backward."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref

import oracle
import pytest
import torch
from cases import over_real_dtypes, random
from torch import Tensor

from gradclip_ext import clamp_grad_, register_clamp_hook

LOW, HIGH = -0.3, 0.7


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(random(*shape, dtype=dtype))


def deliver(grad: Tensor, *params: Tensor) -> None:
    """Run a backward in which every parameter gets ``grad``."""
    torch.autograd.backward([(p * grad).sum() for p in params])


# ---------------------------------------------------------------- like the well-known lambda


@over_real_dtypes
@pytest.mark.parametrize("bounds", [(LOW, HIGH), (-0.5, 0.5), (None, 0.2), (-0.2, None), (0.1, 0.4)], ids=str)
def test_like_a_lambda_with_clamp(bounds: tuple, dtype: torch.dtype) -> None:
    ours, theirs = (weight(6, 5, dtype=dtype) for _ in range(2))
    register_clamp_hook(ours, *bounds)
    theirs.register_hook(lambda g: torch.clamp(g, *bounds))
    grad = random(6, 5, dtype=dtype)
    deliver(grad, ours)
    deliver(grad, theirs)
    oracle.assert_same_bits(ours.grad, theirs.grad)
    oracle.assert_same_bits(ours.grad, grad.clamp(*bounds))


def test_nan_stays_and_infinities_become_the_bound() -> None:
    param = weight(4)
    register_clamp_hook(param, LOW, HIGH)
    deliver(torch.tensor([math.nan, math.inf, -math.inf, 0.5]), param)
    expected = torch.tensor([math.nan, HIGH, LOW, 0.5])
    oracle.assert_same_specials(param.grad, expected)
    oracle.assert_within_ulps(param.grad, expected, 0)


def test_model_trains_like_with_lambdas() -> None:
    x, y = random(8, 4), random(8, 2)
    models = [
        torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)) for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    register_clamp_hook(models[0], -0.05, 0.1)
    for param in models[1].parameters():
        param.register_hook(lambda g: torch.clamp(g, -0.05, 0.1))
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - y).pow(2).sum().backward()
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        oracle.assert_same_bits(one, other)


# ---------------------------------------------------------------- what arrives, and what is written


def test_shared_incoming_buffer_is_not_written() -> None:
    """In ((a + b) * w).sum() autograd passes the same buffer to a and b."""
    a, b, w = weight(5), weight(5), random(5)
    register_clamp_hook(a, LOW, HIGH)
    ((a + b) * w).sum().backward()
    oracle.assert_same_bits(a.grad, w.clamp(LOW, HIGH))
    oracle.assert_same_bits(b.grad, w)


def test_incoming_gradient_is_left_alone() -> None:
    param, grad = weight(5), random(5)
    register_clamp_hook(param, LOW, HIGH)
    with oracle.unchanged([grad]):
        param.backward(grad)
    oracle.assert_same_bits(param.grad, grad.clamp(LOW, HIGH))


def test_tied_weight_sees_one_call_with_the_sum() -> None:
    param, one, two = weight(5), random(5), random(5)
    register_clamp_hook([param, param], LOW, HIGH)
    ((param * one).sum() + (param * two).sum()).backward()
    oracle.assert_same_bits(param.grad, (one + two).clamp(LOW, HIGH))


def test_accumulation_clamps_each_backward_not_the_sum() -> None:
    param, grads = weight(5), [torch.full((5,), 0.5) + random(5) * 1e-3 for _ in range(3)]
    register_clamp_hook(param, LOW, HIGH)
    for grad in grads:
        deliver(grad, param)
    oracle.assert_same_bits(param.grad, grads[0] + grads[1] + grads[2])
    assert (param.grad > HIGH).all()
    clamp_grad_(param, LOW, HIGH)
    assert (param.grad == HIGH).all()


def test_runs_before_post_accumulate_hooks() -> None:
    """Clipping with the optimizer inside backward."""
    param, seen = weight(4), []
    param.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    register_clamp_hook(param, LOW, HIGH)
    grad = random(4)
    deliver(grad, param)
    oracle.assert_same_bits(seen[0], grad.clamp(LOW, HIGH))


def test_double_backward() -> None:
    """Differentiable: where the gradient was clamped its derivative is zero."""
    ours, theirs = weight(6), weight(6)
    theirs.data.copy_(ours.data)
    register_clamp_hook(ours, LOW, HIGH)
    theirs.register_hook(lambda g: torch.clamp(g, LOW, HIGH))
    results = []
    for param in (ours, theirs):
        (first,) = torch.autograd.grad((param**3).sum(), param, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), param)
        results.append((first, second))
    for one, other in zip(*results):
        oracle.assert_same_bits(one, other)
    assert results[0][0].max() <= torch.tensor(HIGH)


def test_activations() -> None:
    x = weight(4)
    hidden = x * 2
    register_clamp_hook(hidden, LOW, HIGH)
    deliver(grad := random(4), hidden)
    oracle.assert_same_bits(x.grad, grad.clamp(LOW, HIGH) * 2)


# ---------------------------------------------------------------- sparse gradients


@pytest.mark.parametrize("bounds", [(-0.5, 0.75), (None, 0.5), (-0.5, None), (0.0, 0.5)], ids=str)
def test_sparse_gradients_stay_sparse(bounds: tuple) -> None:
    """An embedding clamps what a dense one does: the sum over the rows that were looked up twice."""
    sparse, dense = torch.nn.Embedding(6, 3, sparse=True), torch.nn.Embedding(6, 3)
    dense.load_state_dict(sparse.state_dict())
    indices, upstream = torch.tensor([1, 4, 1, 0]), random(4, 3)
    for embedding in (sparse, dense):
        register_clamp_hook(embedding, *bounds)
        for _ in range(2):  # the second one is added to the first
            (embedding(indices) * upstream).sum().backward()
    assert sparse.weight.grad.is_sparse
    oracle.assert_same_bits(sparse.weight.grad.to_dense() + 0.0, dense.weight.grad + 0.0)


def test_sparse_gradients_without_entries() -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    register_clamp_hook(embedding, -0.5, 0.5)
    embedding(torch.empty(0, dtype=torch.long)).sum().backward()
    assert embedding.weight.grad.is_sparse and embedding.weight.grad.shape == (4, 2)


@pytest.mark.parametrize("bounds", [(0.25, 0.75), (None, -0.1)], ids=str)
def test_sparse_gradients_between_bounds_without_zero(bounds: tuple) -> None:
    """Every element that is not stored would become a bound."""
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    register_clamp_hook(embedding, *bounds)
    with pytest.raises(RuntimeError, match=r"sparse=False.*to_dense\(\)"):
        embedding(torch.tensor([1])).sum().backward()
    assert embedding.weight.grad is None


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_other_layouts_are_refused_with_what_to_do() -> None:
    param = weight(3, 3)
    register_clamp_hook(param, -1.0, 1.0)
    hook = next(iter(param._backward_hooks.values()))
    with pytest.raises(RuntimeError, match=r"layout torch.sparse_csr.*to_dense\(\)"):
        hook(random(3, 3).to_sparse_csr())


# ---------------------------------------------------------------- which tensors


def test_frozen_parameters_are_skipped() -> None:
    """torch's register_hook raises for them."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError):
        model[0].weight.register_hook(lambda g: g)
    assert len(register_clamp_hook(model, LOW, HIGH)) == 2
    assert len(register_clamp_hook(model[0], LOW, HIGH)) == 0
    model(random(4, 3)).mul(1e3).sum().backward()
    assert model[0].weight.grad is None and model[1].weight.grad.max() <= torch.tensor(HIGH)


@pytest.mark.parametrize(
    "wrap", [list, tuple, iter, lambda ps: (p for p in ps), lambda ps: dict(enumerate(ps)).values()]
)
def test_containers(wrap) -> None:
    params, grad = [weight(3), weight(3)], random(3)
    assert len(register_clamp_hook(wrap(params), LOW, HIGH)) == 2
    deliver(grad, *params)
    for param in params:
        oracle.assert_same_bits(param.grad, grad.clamp(LOW, HIGH))


def test_single_tensor_and_parameter_list() -> None:
    assert len(register_clamp_hook(weight(3), LOW, HIGH)) == 1
    assert len(register_clamp_hook(torch.nn.ParameterList([weight(3), weight(2)]), LOW, HIGH)) == 2
    assert len(register_clamp_hook([], LOW, HIGH)) == 0


def test_module_counts_a_tied_weight_once() -> None:
    embed, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    assert len(register_clamp_hook(torch.nn.Sequential(embed, head), LOW, HIGH)) == 1


# ---------------------------------------------------------------- the handle


def test_removal() -> None:
    param, grad = weight(5), random(5) * 10
    handle = register_clamp_hook(param, LOW, HIGH)
    assert len(handle) == 1
    handle.remove()
    handle.remove()
    assert len(handle) == 0
    deliver(grad, param)
    oracle.assert_same_bits(param.grad, grad)


def test_removal_leaves_other_hooks() -> None:
    param, grad = weight(5), random(5) * 10
    outer, inner = register_clamp_hook(param, -2.0, 2.0), register_clamp_hook(param, LOW, HIGH)
    inner.remove()
    deliver(grad, param)
    oracle.assert_same_bits(param.grad, grad.clamp(-2.0, 2.0))
    outer.remove()


def test_with_statement() -> None:
    model, x = torch.nn.Linear(3, 2), random(4, 3) * 10
    with register_clamp_hook(model, LOW, HIGH) as handle:
        assert len(handle) == 2
        model(x).sum().backward()
        assert model.weight.grad.abs().max() <= torch.tensor(HIGH)
    model.zero_grad()
    model(x).sum().backward()
    oracle.assert_same_bits(model.weight.grad, torch.autograd.grad(model(x).sum(), model.weight)[0])
    with pytest.raises(KeyError), register_clamp_hook(model, LOW, HIGH) as handle:
        raise KeyError
    assert len(handle) == 0


def test_discarded_handle_keeps_the_hook_and_the_hook_no_parameter() -> None:
    param, grad = weight(5), random(5) * 10
    register_clamp_hook(param, LOW, HIGH)
    gc.collect()
    deliver(grad, param)
    oracle.assert_same_bits(param.grad, grad.clamp(LOW, HIGH))
    handle, alive = register_clamp_hook(param, LOW, HIGH), weakref.ref(param)
    del param
    gc.collect()
    assert alive() is None
    handle.remove()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model: torch.nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("way", COPIES)
def test_a_model_that_keeps_its_handle_can_be_copied(way: str) -> None:
    """Also beside another hook that cannot be pickled. Hooks stay with the tensors that they are on."""
    model = torch.nn.Linear(3, 2)
    model.kept = register_clamp_hook(model, LOW, HIGH)
    model.weight.register_hook(lambda grad: grad)
    twin = COPIES[way](model)
    assert len(twin.kept) == 0 and len(model.kept) == 2
    twin.kept.remove()
    upstream = torch.full((1, 3), 50.0)
    model(upstream).sum().backward()
    twin(upstream).sum().backward()
    assert (model.weight.grad == torch.tensor(HIGH)).all() and (twin.weight.grad == 50.0).all()


def test_a_handle_of_torch_beside_a_clamp_hook_can_be_pickled() -> None:
    """Such a handle pickles every hook of its tensor."""
    param = weight(3)
    other = param.register_hook(torch.abs)
    register_clamp_hook(param, LOW, HIGH)
    pickle.dumps(other)


def test_an_exception_leaves_no_hook_behind() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LazyLinear(1))
    with pytest.raises(ValueError, match="uninitialized parameter"):
        register_clamp_hook(model, -1e-3, 1e-3)
    model[0](torch.ones(1, 3)).sum().backward()
    assert torch.equal(model[0].weight.grad, torch.ones(2, 3))


def test_bounds_are_read_once() -> None:
    """A bound given as a tensor is a number from then on: changing the tensor changes nothing."""
    param, grad, high = weight(5), random(5) * 10, torch.tensor(HIGH, dtype=torch.float64)
    register_clamp_hook(param, LOW, high)
    high.fill_(5.0)
    deliver(grad, param)
    oracle.assert_same_bits(param.grad, grad.clamp(LOW, HIGH))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch >= 2.10 has Tensor.grad_dtype")
def test_the_dtype_of_the_gradient_decides_on_bounds() -> None:
    narrow, wide = weight(3), weight(3, dtype=torch.float16)
    narrow.grad_dtype, wide.grad_dtype = torch.float16, torch.float32
    with pytest.raises(RuntimeError, match="float16"):
        register_clamp_hook([wide, narrow], -1.0, 1e5)
    register_clamp_hook(wide, -1e5, 1e5)
    grad = torch.tensor([2e5, -2e5, 7.0])
    wide.backward(grad)
    oracle.assert_same_bits(wide.grad, grad.clamp(-1e5, 1e5))
