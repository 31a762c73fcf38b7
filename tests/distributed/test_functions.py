"""Every function on DTensors: values, hooks, patching, versions, refusals; failures leave nobody waiting."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
from cases import SEED, needs_gloo
from ranks import Ranks
from sharding import Avg, Copy, Model, Shard0, Shard1, Sum, check_clipped, collectives, local, mesh, plain
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

import gradclip_ext
from gradclip_ext import reference

pytestmark = needs_gloo
# A rank that waits for another one does so for a minute: well below that, nobody was waiting.
SOON = 20.0


def sharded(seed: int = SEED) -> Model:
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    model.add((5,), mesh(4), Shard0)
    model.add((3,), mesh(4), Copy)
    return model


# ---------------------------------------------------------------- values


def values(seed: int) -> None:
    model = sharded(seed)
    model.add((2, 2))
    calls: dict[str, tuple[Callable[[], Any], Callable[[torch.Tensor], torch.Tensor]]] = {
        "clip_grad_value_": (
            lambda: gradclip_ext.clip_grad_value_(model.params, 0.5),
            lambda t: t.clamp(-0.5, 0.5),
        ),
        "clamp_grad_": (
            lambda: gradclip_ext.clamp_grad_(model.params, -0.1, None),
            lambda t: t.clamp(min=-0.1),
        ),
        "clip_grads_with_norm_": (
            lambda: gradclip_ext.clip_grads_with_norm_(model.params, 1.0, torch.tensor(4.0)),
            lambda t: t * oracle.coefficient(torch.tensor(4.0), 1.0),
        ),
    }
    for name, (call, expected) in calls.items():
        before = [part.clone() for part in model.parts()]
        versions = [p.grad._version for p in model.params]
        with collectives() as sent:
            call()
        assert not sent
        for part, old in zip(model.parts(), before):
            oracle.assert_same_bits(part, expected(old), name)
        assert all(p.grad._version > v for p, v in zip(model.params, versions)), name


def test_values_need_no_communication(ranks: Ranks) -> None:
    ranks.run(values, SEED)


def partial(seed: int) -> str:
    model = Model(seed)
    model.add((4, 2), mesh(4), Sum)
    gradclip_ext.clip_grads_with_norm_(model.params, 1.0, torch.tensor(2.0))  # a sum scales by its parts
    with oracle.unchanged(model.parts()):
        for call in (gradclip_ext.clip_grad_value_, gradclip_ext.clamp_grad_):
            with pytest.raises(RuntimeError) as caught:
                call(model.params, 0.1)
    return str(caught.value)


def test_partial_values_are_refused(ranks: Ranks) -> None:
    for message in ranks.run(partial, SEED):
        assert re.search("gradient 0 .*still has to be summed.*reduce it first", message), message


def norm_of_torch(seed: int) -> None:
    """The norm may be a DTensor: ours, or torch's of order inf, which is Partial."""
    for norm_type in (2.0, math.inf):
        for get in (gradclip_ext.get_total_norm, torch.nn.utils.get_total_norm):
            model = Model(seed)  # torch's norm of order inf fails on empty shards
            model.add((8, 3), mesh(4), Shard0)
            model.add((3,), mesh(4), Copy)
            before = [part.clone() for part in model.parts()]
            norm = get([p.grad for p in model.params], norm_type)
            gradclip_ext.clip_grads_with_norm_(model.params, 1e-2, norm)
            whole = norm.full_tensor()
            oracle.assert_scaled(model.parts(), before, whole, 1e-2)


def test_total_norm_that_is_a_dtensor(ranks: Ranks) -> None:
    ranks.run(norm_of_torch, SEED)


def decided(seed: int) -> None:
    """A limit that follows from the joint norm, norms for each parameter, zeros on all ranks for one NaN."""
    seen: list[type] = []

    def half(norm: torch.Tensor) -> torch.Tensor:
        seen.append(type(norm))
        return norm / 2

    model = sharded(seed)
    before = [part.clone() for part in model.parts()]
    norm = plain(gradclip_ext.clip_grad_norm_(model.params, half))
    assert seen == [torch.Tensor]
    oracle.assert_scaled(model.parts(), before, norm, norm.item() / 2)

    before = [part.clone() for part in model.parts()]
    norms = torch.tensor([4.0, math.nan, 8.0])
    with collectives() as sent:
        gradclip_ext.clip_grads_with_norm_(model.params, 1.0, norms, zero_if_nonfinite=True)
    assert not sent
    for part, old, one in zip(model.parts(), before, norms):
        if one.isnan():
            oracle.assert_same_bits(part, torch.zeros_like(part))
        else:
            oracle.assert_scaled([part], [old], one, 1.0)

    if dist.get_rank() == 1:
        model.parts()[0].view(-1)[0] = math.nan
    assert plain(gradclip_ext.clip_grad_norm_(model.params, math.inf, zero_if_nonfinite=True)).isnan()
    for part in model.parts():
        oracle.assert_same_bits(part, torch.zeros_like(part))


def test_limits_and_zeros(ranks: Ranks) -> None:
    ranks.run(decided, SEED)


def adaptive(seed: int) -> str:
    """Units that lie whole on one rank need no communication; slices that do not are refused."""
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    model.add((3, 5), mesh(4), Copy)
    model.add((3,), mesh(4), Copy)
    model.add((6, 2))
    for param in model.params:
        local(param.detach()).fill_(0.5)
    weights = [torch.full_like(whole, 0.5) for whole in model.whole]
    expected = reference.adaptive_clip(model.whole, weights, 0.1, 1e-3)
    with collectives() as sent:
        gradclip_ext.adaptive_clip_grad_(model.params, 0.1)
    assert not sent
    for param, exact in zip(model.params, expected):
        found = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-9)
    model.add((2, 8), mesh(4), Shard1)
    with oracle.unchanged(model.parts()), pytest.raises(NotImplementedError) as caught:
        gradclip_ext.adaptive_clip_grad_(model.params, 1e-3)
    return str(caught.value)


def test_adaptive_clipping(ranks: Ranks) -> None:
    for message in ranks.run(adaptive, SEED, timeout=SOON):
        assert re.search(r"4 \(shape \(2, 8\)\).*no rank has whole slices.*Replicate", message), message


def divided_vectors(seed: int) -> Model:
    """Parameters as fully_shard and HSDP make them: biases are divided, and one unit each."""
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    model.add((3,), mesh(4), Shard0)  # the last rank has no element of it
    model.add((5,), mesh(4), Copy)
    model.add((9,), mesh(4), Shard0, dtype=torch.bfloat16)
    model.add((7,), mesh(2, 2), Copy, Shard0)
    model.add((4,))
    for param in model.params:
        local(param.detach()).fill_(0.5)
    return model


def adaptive_of_vectors(seed: int) -> None:
    model = divided_vectors(seed)
    weights = [torch.full_like(whole, 0.5) for whole in model.whole]
    for order in (2.0, math.inf, 3.0):
        expected = reference.adaptive_clip(model.whole, weights, 0.1, 1e-3, order)
        before = [part.clone() for part in model.parts()]
        gradclip_ext.adaptive_clip_grad_(model.params, 0.1, norm_type=order)
        for param, exact in zip(model.params, expected):
            found = param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad
            bound = max(1e-6, torch.finfo(found.dtype).eps)
            torch.testing.assert_close(found.double(), exact, rtol=bound, atol=1e-9)
        for part, old in zip(model.parts(), before):
            part.copy_(old)
    model.params[1].grad = model.params[4].grad = None
    with collectives() as sent:
        gradclip_ext.adaptive_clip_grad_(model.params, 0.1)
    # Two for the norms of weights and two for those of gradients: of two vectors, and of one on its own mesh.
    assert [size for _, size, _ in sent] == 4 * [16] + 4 * [8], sent


def failing_adaptive(seed: int) -> str:
    model = divided_vectors(seed)
    if dist.get_rank() == 1:
        model.params[5].grad = torch.ones(1).expand(4)
    try:
        with oracle.unchanged(model.parts()[:-1] if dist.get_rank() == 1 else []):
            gradclip_ext.adaptive_clip_grad_(model.params, 0.1)
    except RuntimeError as error:
        return str(error)
    assert all(part.isnan().all() for param, part in zip(model.params, model.parts()) if is_divided(param))
    return ""


def is_divided(param: Tensor) -> bool:
    return isinstance(param, DTensor) and param.dim() == 1 and Shard0 in param.placements


def test_adaptive_clipping_of_divided_vectors(ranks: Ranks) -> None:
    ranks.run(adaptive_of_vectors, SEED, timeout=SOON)
    messages = ranks.run(failing_adaptive, SEED, timeout=SOON)
    assert "expanded" in messages[1] and not any(messages[:1] + messages[2:]), messages


# ---------------------------------------------------------------- the kind of result


def kinds(seed: int) -> list[str]:
    model = sharded(seed)
    found = []
    for norm_type in (2.0, math.inf):
        norm = gradclip_ext.clip_grad_norm_(model.params, 1.0, norm_type)
        assert isinstance(norm, DTensor)
        found.append(str(norm.placements))
        assert norm.full_tensor().item() == plain(norm).item()
    for params, options in (
        ([*model.params, torch.nn.Parameter(torch.zeros(2))], {}),  # no gradient: decides nothing
        (model.params, {"group": ()}),
    ):
        norm = gradclip_ext.clip_grad_norm_(params, 1.0, **options)
        found.append(type(norm).__name__)
    with gradclip_ext.patch_torch():
        assert isinstance(torch.nn.utils.clip_grad_norm_(model.params, 1.0), DTensor)
        assert isinstance(torch.nn.utils.get_total_norm([p.grad for p in model.params]), DTensor)
    assert not isinstance(gradclip_ext.get_total_norm([]), DTensor)
    return found


def test_results_are_of_torchs_type(ranks: Ranks) -> None:
    assert ranks.run(kinds, SEED) == [["(Replicate(),)"] * 2 + ["DTensor", "Tensor"]] * 4


def left_to_torch(seed: int) -> None:
    """Order 0, and placements that are no sums."""
    model = sharded(seed)
    grads = [p.grad for p in model.params]
    try:
        theirs = torch.nn.utils.get_total_norm(grads, 0.0)
    except NotImplementedError:  # torch 2.6
        with pytest.raises(NotImplementedError, match="norm type"):
            gradclip_ext.get_total_norm(grads, 0.0)
    else:
        assert torch.equal(gradclip_ext.get_total_norm(grads, 0.0).full_tensor(), theirs.full_tensor())
    largest = DTensor.from_local(torch.ones(3) * dist.get_rank(), mesh(4), [Partial("max")], run_check=False)
    assert gradclip_ext.get_total_norm([largest]).full_tensor() > 0
    with pytest.raises(NotImplementedError, match=r"tensor 1 \(shape \(3,\)\).*Partial.*redistribute"):
        gradclip_ext.get_total_norm([torch.ones(2), largest])


def test_what_is_left_to_torch(ranks: Ranks) -> None:
    ranks.run(left_to_torch, SEED)


# ---------------------------------------------------------------- gradients that some ranks lack


def missing(seed: int, without: tuple[int, ...], norm_type: float) -> tuple[bytes, float]:
    """Return the norm's bits where some ranks lack the first gradient (an expert without a token)."""
    model = sharded(seed)
    if dist.get_rank() in without:
        for param in model.params:
            param.grad = None
    bits = plain(gradclip_ext.clip_grad_norm_(model.params, 1e-2, norm_type)).numpy().tobytes()
    with pytest.warns(UserWarning, match="empty generator"):
        assert gradclip_ext.clip_grad_norm_((p for p in []), 1.0) == 0.0  # no hidden collective
    return bits, norm_type


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 7.0, -math.inf])
def test_gradients_that_are_none_on_some_ranks(ranks: Ranks, norm_type: float) -> None:
    for without in ((), (0,), (1, 3), (0, 1, 2, 3)):
        answers = ranks.run(missing, SEED, without, norm_type, timeout=SOON)
        assert len(set(answers)) == 1, answers


def missing_float64(seed: int, of_all: bool) -> str:
    """Return the norm's dtype where rank 1 lacks the one gradient in float64."""
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0, dtype=torch.float64)
    model.add((8, 3), mesh(4), Shard0)
    if dist.get_rank() == 1 or of_all:
        model.params[0].grad = None
    return str(plain(gradclip_ext.clip_grad_norm_(model.params, 1.0)).dtype)


def test_the_dtype_does_not_depend_on_what_a_rank_lacks(ranks: Ranks) -> None:
    for of_all in (False, True):
        assert ranks.run(missing_float64, SEED, of_all, timeout=SOON) == 4 * ["torch.float64"]


def empty_shards(seed: int) -> None:
    for norm_type in (math.inf, -math.inf, -1.0, 2.0):
        model = Model(seed)
        model.add((1, 5), mesh(4), Shard0)  # three ranks hold nothing
        check_clipped(model, norm_type, 1e-3)
        model = Model(seed)
        model.add((0, 5), mesh(4), Shard0)  # nobody does
        check_clipped(model, norm_type, 1e-3)


def test_empty_shards(ranks: Ranks) -> None:
    ranks.run(empty_shards, SEED, timeout=SOON)


# ---------------------------------------------------------------- failures on one rank


def failing(fault: str, at: int, norm_type: float) -> str:
    model = sharded(1)
    model.add((4, 3))
    model.add((6, 2), mesh(4), Avg)
    options: dict[str, Any] = {}
    if dist.get_rank() == at:
        if fault == "NaN":
            model.parts()[0].view(-1)[0] = math.nan
        elif fault == "expanded":
            model.params[3].grad = torch.ones(1, 3).expand(4, 3)
        elif fault == "sparse":
            model.params[3].grad = torch.ones(4, 3).to_sparse()
        elif fault == "copies":
            options["copies"] = lambda p: 0
    if fault == "copies":
        options = {"copies": lambda p: 1, **options, "group": ()}
    options["error_if_nonfinite"] = fault == "NaN"
    before = [part.clone() for part in model.parts()]
    try:
        norm = gradclip_ext.clip_grad_norm_(model.params, 1e-3, norm_type, **options)
    except Exception as error:
        for part, old in zip(model.parts(), before):
            if part.layout is torch.strided:
                assert torch.equal(part.nan_to_num(7.0), old.nan_to_num(7.0))
        return f"{type(error).__name__}: {error}"
    return str(plain(norm).item())


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 7.0])
@pytest.mark.parametrize(
    ("fault", "own", "others"),
    [
        (
            "NaN",
            "RuntimeError: .*non-finite.*in tensor 0 of this rank's list",
            "RuntimeError: .*non-finite.*This rank's gradients are finite",
        ),
        ("expanded", "RuntimeError: gradient 3 .*expanded", "nan"),
        ("sparse", "TypeError: gradient 3 .*sparse", "nan"),
        ("copies", "ValueError: copies returned 0 for tensor 0", "nan"),
    ],
)
def test_a_failure_on_one_rank(ranks: Ranks, fault: str, own: str, others: str, norm_type: float) -> None:
    for at in (0, 2):
        answers = ranks.run(failing, fault, at, norm_type, timeout=SOON)
        for rank, answer in enumerate(answers):
            assert re.match(own if rank == at else others, answer, re.DOTALL), (rank, answer)


# ---------------------------------------------------------------- hooks


def hook(seed: int) -> None:
    model = sharded(seed)
    param = model.params[0]
    param.grad = None
    with gradclip_ext.register_clamp_hook([param], -0.1, 0.2):
        (param * torch.ones_like(param) * 9).sum().backward()
    torch.testing.assert_close(param.grad.full_tensor(), torch.full((8, 3), 0.2))


def test_clamp_hook(ranks: Ranks) -> None:
    ranks.run(hook, SEED)
