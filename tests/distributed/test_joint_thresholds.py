"""Thresholds that follow the joint norm: the same limits and the same state on all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from cases import SEED, needs_gloo
from ranks import WORLD_SIZE, Ranks
from sharding import Model, Shard0, mesh, plain

import gradclip_ext
from gradclip_ext.thresholds import AutoClip, SpikeDetector, ZClip

pytestmark = needs_gloo


def joint(seed: int, bad_rank: int) -> list[bytes]:
    """Clip DTensors beside gradients that differ between the ranks; return the bits of limits and states."""
    rules = [ZClip(warmup_steps=4), AutoClip(window=5)]
    detector = SpikeDetector(window=18)  # judges from its ninth norm on: by a few, any norm may be a spike
    limits: list[torch.Tensor] = []

    for step in range(12):
        for rule in rules:
            model = Model(seed + step)
            model.add((8, 3), mesh(4), Shard0)
            model.add((5,), mesh(4), Shard0)  # one rank holds nothing of it
            own = torch.Generator().manual_seed(seed + WORLD_SIZE * step + dist.get_rank())
            model.params.append(torch.nn.Parameter(torch.zeros(6)))
            model.params[-1].grad = torch.randn(6, generator=own) * (50.0 if step == 9 else 1.0)
            if step == 5 and dist.get_rank() == bad_rank:
                model.params[-1].grad[2] = torch.nan
            seen: list[torch.Tensor] = []

            def kept(
                norm: torch.Tensor, rule: torch.nn.Module = rule, seen: list[torch.Tensor] = seen
            ) -> torch.Tensor:
                seen.append(rule(norm))
                return seen[-1]

            norm = gradclip_ext.clip_grad_norm_(model.params, kept, group=dist.group.WORLD)
            assert len(seen) == 1
            assert norm.isnan() == (step == 5)
            limits += seen
        limits.append(detector(norm))
    assert [bool(limit) for limit in limits[2::3]] == [step in (5, 9) for step in range(12)]
    states = [buffer for rule in (*rules, detector) for buffer in rule.buffers()]
    assert all(state.isfinite().all() for state in states)
    return [t.numpy().tobytes() for t in (*limits, *states)]


def test_same_on_all_ranks(ranks: Ranks) -> None:
    answers = ranks.run(joint, SEED, 2)
    assert all(answer == answers[0] for answer in answers)


def replicated(seed: int) -> list[bytes]:
    """Without group=, the norm of DTensors is a replicated DTensor; a rule takes it as well."""
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    rule, detector = ZClip(warmup_steps=1), SpikeDetector()
    norm = gradclip_ext.clip_grad_norm_(model.params, rule)
    assert rule.mean == plain(norm) and not detector(norm)
    limit = rule(norm * 3)
    assert limit.item() <= 1.0 and detector.norms[0] == plain(norm)
    return [t.numpy().tobytes() for t in (limit, *rule.buffers(), *detector.buffers())]


def test_norm_that_is_a_dtensor(ranks: Ranks) -> None:
    answers = ranks.run(replicated, SEED)
    assert all(answer == answers[0] for answer in answers)
