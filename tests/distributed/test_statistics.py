"""get_grad_stats of DTensors: of whole gradients, by two all-reduces, the same bits on all ranks."""

from __future__ import annotations

import math
import re

import oracle
import pytest
import torch
import torch.distributed as dist
from cases import SEED, needs_gloo
from ranks import Ranks
from sharding import Copy, Model, Shard0, Sum, collectives, mesh

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
    assert [size for _, size, _ in sent] == [2 * 5 * 8, 3 * 5 * 8]
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


def refused(seed: int) -> None:
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    for order in (0.0, -1.0, -math.inf):
        with pytest.raises(NotImplementedError, match="norm_type"):
            gradclip_ext.get_grad_stats(model.params, order)
    model.add((8, 3), mesh(4), Sum)
    with pytest.raises(NotImplementedError, match=r"gradient 1 \(shape \(8, 3\)\).*summed.*redistribute"):
        gradclip_ext.get_grad_stats(model.params)


def test_what_is_refused(ranks: Ranks) -> None:
    ranks.run(refused, SEED, timeout=SOON)
