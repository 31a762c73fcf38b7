"""skip_step_: bit for bit as if the optimizer had not stepped, without a look at the condition."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import optimizers
import pytest
import torch
from dispatch import NoReads
from optimizers import FUSED, assert_same_training, deliver, params_of, random_grads
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from gradclip_ext import skip_step_, skipping

TRUE, FALSE = torch.tensor(True), torch.tensor(False)
# S: skip, .: step, i: an infinity, which a GradScaler finds, I: both
PATTERNS = ("S..", ".S.S.", "SS.", "...", ".i.S.", "Si.I.")
SCALERS = ("no scaler", "scaled", "unscaled", "disabled")


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch allocates for momentum and a skipped step leaves as it is."""
    empty_like = torch.empty_like

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        return empty_like(*args, **kwargs).fill_(math.nan)

    monkeypatch.setattr(torch, "empty_like", poisoned)


def scaler_for(way: str) -> Any:
    if way == "no scaler":
        return None
    return torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=way != "disabled")


def train(ours: Optimizer, theirs: Optimizer, pattern: str, way: str) -> None:
    """Step ours always, and theirs where the pattern does not say to skip."""
    mine, other = scaler_for(way), scaler_for(way)
    for index, step in enumerate(pattern):
        grads = random_grads()
        if step in "iI":
            grads[1][2] = math.inf
        scale = mine.scale(torch.ones(())).item() if mine else 1.0
        deliver(grads, ours, theirs, scale=scale)
        skip = step in "SI"
        skip_step_(ours, torch.tensor(skip))
        if mine is None or not mine.is_enabled():
            ours.step()
            if not skip:
                theirs.step()
        else:
            other.scale(torch.ones(()))
            if way == "unscaled":
                mine.unscale_(ours)
            mine.step(ours)
            other.unscale_(theirs)
            if step == ".":  # torch's fused SGD would keep its first buffers unfilled at an infinity
                theirs.step()
            mine.update()
            other.update()
            assert mine.get_scale() == other.get_scale(), "skipping must not change the scale"
        assert_same_training(ours, theirs, f"{pattern}, {way}, step {index}")
        assert not hasattr(ours, "found_inf") and not hasattr(ours, "grad_scale")


@pytest.mark.parametrize("way", SCALERS)
@pytest.mark.parametrize("name", FUSED)
def test_bitwise_as_not_stepping(name: str, way: str) -> None:
    for pattern in PATTERNS:
        if way in ("no scaler", "disabled") and set(pattern) & set("iI"):
            continue
        train(*optimizers.twins(optimizers.fused(name)), pattern, way)


def without(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Break one part of skipping."""
    broken: dict[str, Callable[[], None]] = {
        "skipping": lambda: monkeypatch.setattr(skipping.Skips, "install", lambda *a: None),
        "exactly 1.0": lambda: monkeypatch.setattr(skipping, "_as_flag", lambda when: when.float() * 2.0),
        "momentum buffers": lambda: monkeypatch.setattr(skipping, "_make_momentum_buffers", lambda o: None),
    }
    broken[what]()


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("what", ["skipping", "exactly 1.0", "momentum buffers"])
def test_the_comparison_notices(monkeypatch: pytest.MonkeyPatch, what: str, name: str) -> None:
    ours, theirs = optimizers.twins(optimizers.fused(name))
    skip_step_(ours, False)
    without(monkeypatch, what)
    if what == "momentum buffers" and not name.startswith("SGD "):
        train(ours, theirs, "S..", "no scaler")
        return
    with pytest.raises(AssertionError, match="S\\.\\., no scaler, step"):
        train(ours, theirs, "S..", "no scaler")


# ---------------------------------------------------------------- requests


@pytest.fixture
def pair() -> tuple[Optimizer, Optimizer]:
    """Two optimizers with the same gradients."""
    ours, theirs = optimizers.twins(optimizers.fused("SGD momentum"))
    deliver(random_grads(), ours, theirs)
    return ours, theirs


CONDITIONS: dict[str, Any] = {
    "0-d": TRUE,
    "one element": torch.tensor([True]),
    "matrix": torch.tensor([[1]]),
    "uint8": torch.tensor(1, dtype=torch.uint8),
    "not 0 or 1": torch.tensor(7),
    "bool": True,
    "int": 1,
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_conditions(pair: tuple[Optimizer, Optimizer], kind: str) -> None:
    ours, theirs = pair
    skip_step_(ours, CONDITIONS[kind])
    found = ours.found_inf
    assert found.dtype is torch.float32 and found.shape == () and found.item() == 1.0
    ours.step()
    assert_same_training(ours, theirs)


@pytest.mark.parametrize("order", list(itertools.product((True, False), repeat=3)), ids=str)
def test_several_calls(pair: tuple[Optimizer, Optimizer], order: tuple[bool, ...]) -> None:
    ours, theirs = pair
    for when in order:
        skip_step_(ours, torch.tensor(when))
    ours.step()
    if not any(order):
        theirs.step()
    assert_same_training(ours, theirs)
    ours.step()
    theirs.step()
    assert_same_training(ours, theirs)


def test_the_condition_is_read_at_once(pair: tuple[Optimizer, Optimizer]) -> None:
    ours, theirs = pair
    when = torch.tensor(True)
    skip_step_(ours, when)
    when.fill_(False)
    ours.step()
    assert_same_training(ours, theirs)


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("passed", ["positional", "keyword"])
@pytest.mark.parametrize("asked", ["before", "inside"])
def test_closures(asked: str, passed: str, is_first: bool) -> None:
    """Momentum buffers need the gradients, which only the closure makes."""
    ours, theirs = optimizers.twins(optimizers.fused("SGD momentum"))
    if not is_first:
        skip_step_(ours, FALSE)
        deliver(random_grads(), ours, theirs)
        ours.step()
        theirs.step()
    calls = []
    for when in (True, False):
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        grads = random_grads()

        def closure(grads: list[Tensor] = grads, when: bool = when) -> float:
            assert torch.is_grad_enabled()
            deliver(grads, ours)
            if asked == "inside":
                skip_step_(ours, torch.tensor(when))
            calls.append(when)
            return 5.0

        if asked == "before":
            skip_step_(ours, torch.tensor(when))
        loss = ours.step(closure) if passed == "positional" else ours.step(closure=closure)
        assert loss == 5.0
        if not when:
            deliver(grads, theirs)
            theirs.step()
        assert_same_training(ours, theirs, f"{when}")
        assert not hasattr(ours, "found_inf")
    assert calls == [True, False]


def test_parameters_that_get_a_first_gradient_later() -> None:
    """Where the step before was skipped, torch's next one is not a first step any more."""
    ours, theirs = optimizers.twins(optimizers.fused("SGD momentum"))
    deliver(random_grads(), ours)
    for param in params_of(ours)[1:]:
        param.grad = None
    skip_step_(ours, TRUE)
    ours.step()
    deliver(random_grads(), ours, theirs)
    ours.step()
    theirs.step()
    assert_same_training(ours, theirs)


# ---------------------------------------------------------------- what may come in between


class Wrong(Exception):
    pass


def in_closure(optimizer: Optimizer) -> None:
    def closure() -> None:
        raise Wrong

    optimizer.step(closure)


def in_hook(optimizer: Optimizer) -> None:
    def hook(*args: Any) -> None:
        raise Wrong

    handle = optimizer.register_step_pre_hook(hook)
    try:
        optimizer.step()
    finally:
        handle.remove()


def in_kernel(optimizer: Optimizer) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def fails(*args: Any, **kwargs: Any) -> None:
            assert args and optimizer.found_inf.item() == 1.0
            raise Wrong

        patch.setattr(torch, "_fused_sgd_", fails)
        optimizer.step()


@pytest.mark.parametrize("fails", [in_closure, in_hook, in_kernel])
@pytest.mark.parametrize("again", ["step", "skip_step_(False)", "skip_step_(True)", "closure"])
def test_a_step_that_raises_takes_the_request_with_it(
    pair: tuple[Optimizer, Optimizer], fails: Callable[[Optimizer], None], again: str
) -> None:
    ours, theirs = pair
    skip_step_(ours, TRUE)
    with pytest.raises(Wrong):
        fails(ours)
    assert_same_training(ours, theirs)
    if again.startswith("skip_step_"):
        skip_step_(ours, torch.tensor("True" in again))
    ours.step(*[lambda: None] if again == "closure" else [])
    if again != "skip_step_(True)":
        theirs.step()
    assert_same_training(ours, theirs)
    assert not hasattr(ours, "found_inf")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("way", SCALERS)
def test_copies(copied: Callable[[Optimizer], Optimizer], way: str) -> None:
    """A copy has no request, and can have one: torch's flag for fused optimizers is not copied."""
    ours, theirs = optimizers.twins(optimizers.fused("SGD momentum"))
    skip_step_(ours, TRUE)
    for optimizer in (twin := copied(ours)), theirs:
        deliver(random_grads(), optimizer)
    assert not hasattr(twin, "found_inf") and not hasattr(twin, "_step_supports_amp_scaling")
    deliver([p.grad for p in params_of(twin)], theirs)
    twin.step()
    theirs.step()
    assert_same_training(twin, theirs)
    train(twin, theirs, "S.i.I." if way in ("scaled", "unscaled") else "S..", way)


def test_a_checkpoint_in_between(pair: tuple[Optimizer, Optimizer]) -> None:
    ours, theirs = pair
    skip_step_(ours, TRUE)
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    ours.step()
    assert_same_training(ours, theirs)


def test_found_inf_of_others(pair: tuple[Optimizer, Optimizer]) -> None:
    """GradScaler's sum over two devices, put there from outside, comes back as it was."""
    ours, theirs = pair
    skip_step_(ours, FALSE)
    ours.step()
    theirs.step()
    for there, when in ((2.0, False), (0.0, True), (0.0, False)):
        skip_step_(ours, torch.tensor(when))
        ours.found_inf = foreign = torch.tensor(there)
        ours.step()
        assert ours.found_inf is foreign
        if not (there or when):
            theirs.step()
        assert_same_training(ours, theirs, f"{there}, {when}")
        del ours.found_inf


def test_two_optimizers(pair: tuple[Optimizer, Optimizer]) -> None:
    ours, theirs = pair
    skip_step_(ours, TRUE)
    skip_step_(theirs, FALSE)
    before = [p.detach().clone() for p in params_of(ours)]
    ours.step()
    theirs.step()
    assert all(torch.equal(p, b) for p, b in zip(params_of(ours), before))
    assert not any(torch.equal(p, b) for p, b in zip(params_of(theirs), before))


def test_schedulers_and_new_groups(pair: tuple[Optimizer, Optimizer]) -> None:
    """A scheduler replaces the method of the instance."""
    ours, theirs = pair
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in pair]
    skip_step_(ours, TRUE)
    ours.step()
    for optimizer in pair:
        new = torch.nn.Parameter(torch.ones(3))
        new.grad = torch.ones(3)
        optimizer.add_param_group({"params": [new]})
    skip_step_(ours, FALSE)
    ours.step()
    theirs.step()
    for scheduler in schedulers:
        scheduler.step()
    assert_same_training(ours, theirs)


@pytest.mark.parametrize("name", FUSED)
def test_nobody_reads_the_condition(name: str) -> None:
    ours, theirs = optimizers.twins(optimizers.fused(name))
    skip_step_(ours, FALSE)  # tries torch's step
    deliver(random_grads(), ours)
    with NoReads():
        skip_step_(ours, torch.tensor(3.0) > 2.0)
        ours.step()
    assert_same_training(ours, theirs)


def test_a_subclass_with_torchs_step(pair: tuple[Optimizer, Optimizer]) -> None:
    class Own(AdamW):
        pass

    train(*optimizers.twins(lambda params: Own(params, fused=True)), "S.S.", "no scaler")


def test_dampening_without_momentum() -> None:
    train(
        *optimizers.twins(lambda params: SGD(params, lr=0.1, dampening=0.5, fused=True)), "S.S.", "no scaler"
    )
