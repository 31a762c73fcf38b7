"""Results for each parameter over ranks: of whole gradients, by two all-reduces, the same bits on all."""

from __future__ import annotations

import math
import re

import oracle
import pytest
import torch
import torch.distributed as dist
from cases import SEED, needs_gloo
from ranks import Ranks
from sharding import Copy, Model, Shard0, Sum, collectives, group_of, mesh

import gradclip_ext
from gradclip_ext import reference

pytestmark = needs_gloo
SOON = 20.0


def joint(seed: int, norm_type: float, special: float | None) -> list[bytes]:
    """Compare with the statistics of the whole gradients; return the bits of the results."""
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    model.add((5,), mesh(4), Shard0)
    model.add((3, 2), mesh(4), Copy)
    model.add((2, 2))
    model.add((1, 7), mesh(4), Shard0)  # three ranks hold nothing
    for index in (0, 2):
        model.parts()[index].view(-1)[:1] = 0.0
        whole = model.whole[index]
        if index == 0:
            whole[::2, 0] = 0.0  # the first element on each rank
        else:
            whole.view(-1)[0] = 0.0
    if special is not None:
        model.whole[1][4] = special
        if dist.get_rank() == 2:
            model.parts()[1][0] = special
    with oracle.unchanged(model.parts()), collectives() as sent:
        stats = gradclip_ext.get_grad_stats([(f"p{i}", p) for i, p in enumerate(model.params)], norm_type)
    # The first call compares the numbers of parameters.
    assert [size for _, size, _ in sent if size != 4 * 8] == [2 * 5 * 8, 3 * 5 * 8]
    exact = reference.statistics(model.whole, norm_type)
    for found, expected in zip((stats.norms, stats.absmax, stats.zeros, stats.nonfinite), zip(*exact)):
        torch.testing.assert_close(
            found.double(), torch.tensor(expected).double(), rtol=1e-6, atol=0.0, equal_nan=True
        )
    total = torch.tensor(reference.total_norm(model.whole, norm_type))
    torch.testing.assert_close(stats.total_norm, total, rtol=1e-6, atol=0.0, equal_nan=True)
    assert stats.numel == (24, 5, 6, 4, 7) and stats.to_dict()["grad/zeros"] == 5
    return [t.numpy().tobytes() for t in (stats.total_norm, stats.norms, stats.absmax, stats.zeros)]


@pytest.mark.parametrize("special", [None, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, 9.0, math.inf])
def test_of_whole_gradients(ranks: Ranks, norm_type: float, special: float | None) -> None:
    answers = ranks.run(joint, SEED, norm_type, special, timeout=SOON)
    assert all(answer == answers[0] for answer in answers)


def missing(seed: int, without: int) -> list[float]:
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    model.add((5,), mesh(4), Shard0)
    if dist.get_rank() == without:
        for param in model.params:
            param.grad = None
    norms: list[float] = gradclip_ext.get_grad_stats(model.params).norms.tolist()
    return norms


def test_a_rank_without_gradients_takes_part(ranks: Ranks) -> None:
    answers = ranks.run(missing, SEED, 1, timeout=SOON)
    assert all(answer == answers[0] for answer in answers)
    assert all(norm > 0.0 for norm in answers[0])


def failing(seed: int) -> str:
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    model.add((4, 3))
    if dist.get_rank() == 2:
        model.params[1].grad = torch.ones(4, 3).to_sparse()
    try:
        return str(gradclip_ext.get_grad_stats(model.params).total_norm.item())
    except TypeError as error:
        return f"TypeError: {error}"


def test_a_failure_on_one_rank_keeps_nobody_waiting(ranks: Ranks) -> None:
    answers = ranks.run(failing, SEED, timeout=SOON)
    for rank, answer in enumerate(answers):
        assert re.match("TypeError: .*sparse" if rank == 2 else "nan", answer), answers


def read_only(seed: int) -> None:
    """An expanded gradient cannot be clipped, but read."""
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    model.params.append(oracle.parameter(torch.full((1,), 2.0).expand(4, 3)))
    stats = gradclip_ext.get_grad_stats(model.params, group=group_of(0, 1, 2, 3))
    assert stats.norms[1].item() == pytest.approx(math.sqrt(4 * 12 * 4.0))


def test_gradients_that_can_only_be_read(ranks: Ranks) -> None:
    ranks.run(read_only, SEED, timeout=SOON)


def refused(seed: int) -> None:
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    for order in (0.0, -1.0, -math.inf):
        with pytest.raises(NotImplementedError, match="norm_type"):
            gradclip_ext.get_grad_stats(model.params, order)
        with pytest.raises(NotImplementedError, match="norm_type"), oracle.unchanged(model.parts()):
            gradclip_ext.clip_grad_norm_(model.params, 1.0, order, per_tensor=True)


def test_what_is_refused(ranks: Ranks) -> None:
    ranks.run(refused, SEED, timeout=SOON)


def sums(seed: int) -> None:
    """A gradient that still has to be summed over ranks counts as its sum."""
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    model.add((8, 3), mesh(4), Sum)
    stats = gradclip_ext.get_grad_stats(model.params)
    norms = torch.tensor(reference.norms(model.whole), dtype=torch.float64)
    torch.testing.assert_close(stats.norms, norms, rtol=1e-6, atol=0.0)
    assert stats.zeros.tolist() == [0, 0]


def test_gradients_to_be_summed(ranks: Ranks) -> None:
    ranks.run(sums, SEED, timeout=SOON)


def grouped(seed: int) -> list[bytes]:
    """Parts of one tensor on each rank, and one that is the same on all, as Megatron's groups have them."""
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.randn(8, 3, generator=generator), torch.randn(5, generator=generator)]
    params = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(5))]
    params[0].grad, params[1].grad = whole[0].chunk(4)[dist.get_rank()].clone(), whole[1].clone()

    def copies(parameter: torch.Tensor) -> int:
        return 4 if parameter is params[1] else 1

    stats = gradclip_ext.get_grad_stats(params, group=dist.group.WORLD, copies=copies)
    exact = torch.tensor(reference.norms(whole), dtype=torch.float64)
    torch.testing.assert_close(stats.norms, exact, rtol=1e-6, atol=0.0)
    limits = torch.tensor([0.5, 1e9])
    norms = gradclip_ext.clip_grad_norm_(
        params, limits, per_tensor=True, group=dist.group.WORLD, copies=copies
    )
    torch.testing.assert_close(norms, exact.float(), rtol=1e-6, atol=0.0)
    assert params[0].grad is not None and params[1].grad is not None
    oracle.assert_scaled([params[0].grad], [whole[0].chunk(4)[dist.get_rank()]], norms[0], 0.5)
    oracle.assert_same_bits(params[1].grad, whole[1])
    return [t.numpy().tobytes() for t in (stats.total_norm, stats.norms, norms)]


def test_groups(ranks: Ranks) -> None:
    answers = ranks.run(grouped, SEED, timeout=SOON)
    assert all(answer == answers[0] for answer in answers)


def each(seed: int, norm_type: float, special: float | None) -> list[bytes]:
    """Clip every gradient by its own norm, as one does that has the whole gradients."""
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    model.add((5,), mesh(4), Shard0)
    model.add((3, 2), mesh(4), Copy)
    model.add((2, 2))
    if special is not None:
        model.whole[1][4] = special
        if dist.get_rank() == 2:
            model.parts()[1][0] = special
    frozen = torch.nn.Parameter(torch.zeros(3))
    before = [part.clone() for part in model.parts()]

    def half(norms: torch.Tensor) -> torch.Tensor:
        return norms / 2

    norms = gradclip_ext.clip_grad_norm_([frozen, *model.params], half, norm_type, per_tensor=True)
    exact = torch.tensor([0.0, *reference.norms(model.whole, norm_type)])
    torch.testing.assert_close(norms, exact, rtol=1e-6, atol=0.0, equal_nan=True)
    for part, old, norm in zip(model.parts(), before, norms[1:]):
        oracle.assert_scaled([part], [old], norm, float(norm) / 2)
    return [norms.numpy().tobytes()]


@pytest.mark.parametrize("special", [None, math.inf, math.nan], ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 7.0, math.inf])
def test_each_is_clipped_by_its_own_norm(ranks: Ranks, norm_type: float, special: float | None) -> None:
    answers = ranks.run(each, SEED, norm_type, special, timeout=SOON)
    assert all(answer == answers[0] for answer in answers)


def nonfinite(seed: int) -> str:
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    model.add((5,), mesh(4), Shard0)
    if dist.get_rank() == 2:
        model.parts()[1][0] = math.nan
    with oracle.unchanged(model.parts()), pytest.raises(RuntimeError) as caught:
        gradclip_ext.clip_grad_norm_(model.params, 1.0, error_if_nonfinite=True, per_tensor=True)
    return str(caught.value)


def test_a_nonfinite_norm_raises_on_all_ranks(ranks: Ranks) -> None:
    for rank, message in enumerate(ranks.run(nonfinite, SEED, timeout=SOON)):
        assert re.search("tensor 1" if rank == 2 else "other ranks", message), message


def unequal(seed: int) -> tuple[str, str]:
    """As on pipeline stages: more parameters on one rank. A group's first call compares the numbers."""
    first, second = (dist.new_group(range(4)) for _ in range(2))
    count = 3 if dist.get_rank() == 1 else 2
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones(2)
    with pytest.raises(ValueError, match="parameters") as by_stats:
        gradclip_ext.get_grad_stats(params, group=first)
    with pytest.raises(ValueError, match="parameters") as by_clipping:
        gradclip_ext.clip_grad_norm_(params, 0.1, per_tensor=True, group=second)
    assert all(torch.equal(param.grad, torch.ones(2)) for param in params if param.grad is not None)
    return str(by_stats.value), str(by_clipping.value)


def other_names(seed: int) -> str:
    """As on pipeline stages of equal size."""
    group = dist.new_group(range(4))
    param = oracle.parameter(torch.ones(2))
    with pytest.raises(ValueError, match="different names") as caught:
        gradclip_ext.get_grad_stats([(f"layers.{dist.get_rank() // 3}.weight", param)], group=group)
    stats = gradclip_ext.get_grad_stats([("weight", param)], group=group)
    assert stats.total_norm.item() == pytest.approx(8**0.5)
    return str(caught.value)


def test_different_names_of_parameters_are_refused_on_all_ranks(ranks: Ranks) -> None:
    for message in ranks.run(other_names, SEED, timeout=SOON):
        assert "pipeline stages differ: leave their mesh out of group=" in message


def test_different_numbers_of_parameters_are_refused_on_all_ranks(ranks: Ranks) -> None:
    for rank, messages in enumerate(ranks.run(unequal, SEED, timeout=SOON)):
        for message in messages:
            assert f"between 2 and 3 parameters, this one {3 if rank == 1 else 2}" in message
