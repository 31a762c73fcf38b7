"""register_clip_hook: clipping inside of step, whoever calls it."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import optimizers
import oracle
import pytest
import torch
from cases import clones, grads_of, random
from optimizers import FUSED, assert_same_training, deliver, params_of, random_grads
from oracle import parameter
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from gradclip_ext import clip_grad_norm_, get_total_norm, register_clip_hook

NAN, INF = math.nan, math.inf

KINDS: dict[str, Callable[[list[Any]], Optimizer]] = {
    **{f"fused {name}": optimizers.fused(name) for name in FUSED},
    "AdamW": AdamW,
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "RMSprop": torch.optim.RMSprop,
}


def groups_of(params: list[Any], *limits: Any) -> list[dict[str, Any]]:
    """Return a group for each parameter; "" stands for a group without a limit of its own."""
    return [{"params": [p], **({} if m == "" else {"max_norm": m})} for p, m in zip(params, limits)]


# ---------------------------------------------------------------- as clipping before the step


@pytest.mark.parametrize("closure", ["no closure", "positional", "keyword"])
@pytest.mark.parametrize("kind", KINDS)
def test_like_clipping_before_the_step(kind: str, closure: str) -> None:
    ours, theirs = optimizers.twins(KINDS[kind])
    handle = register_clip_hook(ours, 0.5)
    for _ in range(3):
        grads = random_grads()
        deliver(grads, theirs)
        norm = clip_grad_norm_(params_of(theirs), 0.5)
        theirs.step()

        def evaluate(grads: list[Tensor] = grads) -> float:
            deliver(grads, ours)
            return 7.0

        if closure == "no closure":
            evaluate()
            ours.step()
        else:
            assert (ours.step(evaluate) if closure == "positional" else ours.step(closure=evaluate)) == 7.0
        oracle.assert_same_bits(handle.total_norm, norm)
        assert_same_training(ours, theirs, kind)


@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_scaler(kind: str, unscaled: bool) -> None:
    """At a power of two, the bits of unscaling, clipping and stepping; infinities are skipped."""
    ours, theirs = optimizers.twins(KINDS[kind])
    handle = register_clip_hook(ours, 0.5)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for index in range(4):
        grads = random_grads()
        if index == 1:
            grads[1][2] = INF
        for scaler, optimizer in zip(scalers, (ours, theirs)):
            deliver([scaler.scale(g) for g in grads], optimizer)
        if unscaled:
            scalers[0].unscale_(ours)
        scalers[0].step(ours)
        scalers[1].unscale_(theirs)
        norm = clip_grad_norm_(params_of(theirs), 0.5)
        if index != 1:
            theirs.step()
            oracle.assert_same_bits(handle.total_norm, norm)
        for scaler in scalers:
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_same_training(ours, theirs, f"{kind}, step {index}")
        assert not hasattr(ours, "found_inf") and not hasattr(ours, "grad_scale")


def test_lbfgs_clips_after_each_evaluation() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.LBFGS([weight], max_iter=3)
    norms: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum() * 10
        loss.backward()
        norms.append(weight.grad.norm().item())
        return loss

    with register_clip_hook(optimizer, 1e-2) as handle:
        optimizer.step(closure)
    assert len(norms) > 1 and handle.total_norm.item() == pytest.approx(norms[-1])
    assert weight.grad.norm().item() == pytest.approx(1e-2, rel=1e-4)


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("norm_type", [2.0, 1.0, INF])
def test_groups(norm_type: float) -> None:
    """One joint norm without the key, an own one with it, and None for neither."""
    params = [parameter(random(*shape)) for shape in ((4,), (3, 2), (5,), (6,), (2,))]
    before = clones(grads_of(params))
    optimizer = SGD(groups_of(params, "", 0.25, "", None, torch.tensor(0.5)), lr=0.0)
    handle = register_clip_hook(optimizer, 1.0, norm_type)
    optimizer.step()

    def check(indices: list[int], limit: float) -> None:
        norm = get_total_norm([before[i] for i in indices], norm_type)
        oracle.assert_scaled([params[i].grad for i in indices], [before[i] for i in indices], norm, limit)

    check([0, 2], 1.0)
    check([1], 0.25)
    check([4], 0.5)
    oracle.assert_same_bits(params[3].grad, before[3])
    oracle.assert_norm(handle.total_norm, [before[i] for i in (0, 1, 2, 4)], norm_type)


def test_limits_may_change_and_are_saved() -> None:
    params = [parameter(random(4)), parameter(100 * random(3))]
    optimizer = SGD(groups_of(params, "", None), lr=0.0)
    register_clip_hook(optimizer, INF)
    saved = optimizer.state_dict()
    optimizer.param_groups[1]["max_norm"] = 0.125
    optimizer.step()
    assert params[1].grad.norm().item() == pytest.approx(0.125, rel=1e-4)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["max_norm"] is None
    optimizer.param_groups[0]["max_norm"] = -1.0
    with oracle.unchanged(grads_of(params)), pytest.raises(ValueError, match=r"param_groups\[0\].*0 or more"):
        optimizer.step()


def test_functions_and_tensors_as_limits() -> None:
    params = [parameter(random(4)), parameter(random(3))]
    before = clones(grads_of(params))
    optimizer = SGD(groups_of(params, "", lambda norm: norm / 8), lr=0.0)
    register_clip_hook(optimizer, torch.tensor(0.5))
    optimizer.step()
    # Norms of torch's may be one ulp off, and so would be an eighth of one.
    norms = [get_total_norm([old]) for old in before]
    for param, old, norm, limit in zip(params, before, norms, (0.5, norms[1].item() / 8)):
        oracle.assert_scaled([param.grad], [old], norm, limit)


def test_nothing_to_clip() -> None:
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    for limits in (("", ""), (None, None), (0.5, 0.5)):
        optimizer = SGD(groups_of(params, *limits), lr=0.1)
        handle = register_clip_hook(optimizer, 1.0)
        assert handle.total_norm is None
        optimizer.step()
        oracle.assert_same_bits(handle.total_norm, torch.tensor(0.0))


def test_nothing_changes_if_a_later_group_cannot_be_clipped() -> None:
    good, bad = parameter(random(4)), parameter(torch.ones(1).expand(3))
    optimizer = SGD(groups_of([good, bad], "", 0.5), lr=0.1)
    register_clip_hook(optimizer, 1e-3)
    with oracle.unchanged([good.grad, good.detach()]), pytest.raises(RuntimeError, match="expanded"):
        optimizer.step()


# ---------------------------------------------------------------- skip_if_nonfinite


@pytest.mark.parametrize("scaled", ["no scaler", "scaled", "unscaled"])
@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_nonfinite_norms_skip(name: str, value: float, scaled: str) -> None:
    ours, theirs = optimizers.twins(optimizers.fused(name))
    handle = register_clip_hook(ours, 0.5, skip_if_nonfinite=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled != "no scaler")
    for index in range(4):
        grads = random_grads()
        if index % 2 == 0:
            grads[1][2] = value
        deliver([scaler.scale(g) for g in grads], ours)
        if scaled == "unscaled":
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        deliver(grads, theirs)
        norm = clip_grad_norm_(params_of(theirs), 0.5)
        if index % 2:
            theirs.step()
            oracle.assert_same_bits(handle.total_norm, norm)
        else:
            assert not handle.total_norm.isfinite()
        assert_same_training(ours, theirs, f"{name}, step {index}")
        assert not hasattr(ours, "found_inf")


@pytest.mark.parametrize("closure", [False, True])
def test_nonfinite_norm_of_one_group(closure: bool) -> None:
    weights = [torch.nn.Parameter(random(4)) for _ in range(3)]
    optimizer = AdamW(groups_of(weights, "", 0.5, None), lr=0.1, fused=True)
    register_clip_hook(optimizer, 1.0, skip_if_nonfinite=True)
    for spoiled in range(3):
        before = clones(weights)

        def evaluate(spoiled: int = spoiled) -> None:
            for index, weight in enumerate(weights):
                weight.grad = random(4) if index != spoiled else torch.full((4,), NAN)

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        if spoiled < 2:
            assert all(torch.equal(w, b) for w, b in zip(weights, before))
        else:  # excluded from the norm
            assert not any(torch.equal(w, b) for w, b in zip(weights, before))


# ---------------------------------------------------------------- the handle


def test_removal_and_with_statement() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = SGD([weight], lr=0.0)
    with register_clip_hook(optimizer, 1.0) as handle:
        weight.grad = torch.tensor([3.0, 4.0])
        optimizer.step()
        assert weight.grad.norm() < 1.1 and handle.total_norm == 5.0
    handle.remove()
    weight.grad = torch.tensor([30.0, 40.0])
    optimizer.step()
    assert weight.grad.norm() == 50.0 and handle.total_norm == 5.0


def test_a_model_that_keeps_its_handle_can_be_saved() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = AdamW(model.parameters(), fused=True)
    model.kept = register_clip_hook(optimizer, lambda norm: norm, skip_if_nonfinite=True)
    torch.save(model, io.BytesIO())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.kept.remove()
    assert len(optimizer._optimizer_step_pre_hooks) == 2
    assert not copy.deepcopy(optimizer)._optimizer_step_pre_hooks


# ---------------------------------------------------------------- errors


def refused(optimizer: Any, error: type[Exception], match: str, *args: Any, **options: Any) -> None:
    with pytest.raises(error, match=match):
        register_clip_hook(optimizer, *args, **options)
    if isinstance(optimizer, Optimizer):
        assert not vars(optimizer).get("_optimizer_step_pre_hooks")


def test_bad_arguments() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    sgd = SGD([weight], lr=0.1)
    refused(sgd, ValueError, "max_norm must be 0 or more", -1.0)
    refused(sgd, ValueError, "max_norm must be 0 or more", NAN)
    refused(sgd, TypeError, "max_norm", None)
    refused(sgd, TypeError, "norm_type", 1.0, [])
    refused(sgd, ValueError, "one element", torch.ones(3))
    refused(sgd, ValueError, "does not exist", 1.0, backend="none")
    refused("SGD", TypeError, r"torch\.optim\.Optimizer, got str", 1.0)
    refused(sgd, TypeError, "SGD are not fused", 1.0, skip_if_nonfinite=True)
    fused = SGD([weight], lr=0.1, fused=True)
    refused(fused, ValueError, "norm_type=0.0", 1.0, 0.0, skip_if_nonfinite=True)
    for limit, error in ((-0.5, ValueError), (NAN, ValueError), (torch.ones(2), ValueError), ([], TypeError)):
        refused(SGD(groups_of([weight], limit), lr=0.1), error, r"param_groups\[0\]: ", 1.0)


def test_wrappers_without_hooks() -> None:
    class Wrapper(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    refused(Wrapper(SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)), TypeError, r"wrapper\.optimizer", 1.0)


def test_optimizers_that_unscale_by_themselves() -> None:
    class Own(SGD):
        def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
            raise AssertionError("reached")

    weight = parameter(random(2))
    optimizer = Own([weight], lr=0.1)
    register_clip_hook(optimizer, 1.0)
    with oracle.unchanged([weight.grad]), pytest.raises(RuntimeError, match="unscale_and_clip_grad_norm_"):
        optimizer.step(grad_scaler=torch.amp.GradScaler("cpu"))
