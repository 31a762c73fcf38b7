"""Skipping, unscaling and clipping inside of step on several ranks: all of them decide alike."""

from __future__ import annotations

import math
from typing import Any

import oracle
import torch
import torch.distributed as dist
from cases import SEED, needs_gloo
from ranks import Ranks
from sharding import Model, Shard0, local, mesh, plain, stripe
from torch.optim import SGD, AdamW

import gradclip_ext

pytestmark = needs_gloo


def optimizers(params: list[Any]) -> list[tuple[str, Any]]:
    return [
        ("AdamW", AdamW(params, lr=0.1, fused=True)),
        ("SGD", SGD(params, lr=0.1, momentum=0.9, fused=True)),
    ]


def joint_norm_of_two_ranks(seed: int) -> None:
    """Pairs of ranks: a spike on one rank of the first pair skips the step of both, and of no others."""
    pair = stripe([0, 1], [2, 3])
    for name, optimizer in optimizers(list(torch.nn.Linear(3, 2).requires_grad_().parameters())):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for step in range(3):
            before = [p.detach().clone() for p in params]
            for param in params:
                param.grad = torch.full_like(param, 1.0 + dist.get_rank())
            if step == 1 and dist.get_rank() == 1:
                params[0].grad[0, 0] = 1e4
            norm = gradclip_ext.clip_grad_norm_(params, 1.0, group=pair)
            gradclip_ext.skip_step_(optimizer, norm > 100.0)
            optimizer.step()
            stays = step == 1 and dist.get_rank() < 2
            for param, old in zip(params, before):
                assert torch.equal(param, old) is stays, f"{name}, step {step}"


def test_skip_by_the_joint_norm_of_two_ranks(ranks: Ranks) -> None:
    ranks.run(joint_norm_of_two_ranks, SEED)


def sharded_model(seed: int) -> Model:
    model = Model(seed)
    model.add((8, 3), mesh(4), Shard0)
    model.add((5,), mesh(4), Shard0)
    return model


def sharded(seed: int) -> None:
    """DTensors: torch has a sharded step for AdamW only. The norm, and what is compared, are DTensors."""
    model = sharded_model(seed)
    for param in model.params:
        local(param.data).fill_(1.0)
    optimizer = AdamW(model.params, lr=0.1, fused=True)
    for limit in (0.0, math.inf, 0.0):
        before = [local(p.detach()).clone() for p in model.params]
        norm = gradclip_ext.clip_grad_norm_(model.params, 1.0)
        gradclip_ext.skip_step_(optimizer, norm > limit)
        optimizer.step()
        for param, old in zip(model.params, before):
            assert not old.numel() or torch.equal(local(param.detach()), old) is (limit == 0.0), limit


def test_skip_with_dtensors(ranks: Ranks) -> None:
    ranks.run(sharded, SEED)


def unscaled(seed: int) -> None:
    """An infinity on one rank is found on all of them; otherwise the bits are those of clipping."""
    for value in (1.0, math.inf):
        model, twin = sharded_model(seed), sharded_model(seed)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        for part in model.parts():
            part.mul_(1024.0)
        if dist.get_rank() == 2:
            model.parts()[0].view(-1)[0] *= value
        optimizer = SGD(model.params, lr=0.1)
        norm = plain(gradclip_ext.unscale_and_clip_grad_norm_(scaler, optimizer, 0.5))
        found = [f.item() for f in scaler._found_inf_per_device(optimizer).values()]
        assert found == [float(math.isinf(value))]
        if value == 1.0:
            oracle.assert_same_bits(norm, plain(gradclip_ext.clip_grad_norm_(twin.params, 0.5)))
            for part, other in zip(model.parts(), twin.parts()):
                oracle.assert_same_bits(part, other)


def test_unscale_and_clip_dtensors(ranks: Ranks) -> None:
    ranks.run(unscaled, SEED)


def hooked(seed: int) -> None:
    """Groups with norms of their own communicate one after the other."""
    model, twin = sharded_model(seed), sharded_model(seed)
    groups = [{"params": [model.params[0]]}, {"params": [model.params[1]], "max_norm": 0.25}]
    optimizer = SGD(groups, lr=0.0)
    handle = gradclip_ext.register_clip_hook(optimizer, 0.5)
    optimizer.step()
    for param, limit in zip(twin.params, (0.5, 0.25)):
        gradclip_ext.clip_grad_norm_([param], limit)
    for part, other in zip(model.parts(), twin.parts()):
        oracle.assert_same_bits(part, other)
    assert abs(plain(handle.total_norm).item() - model.norm(2.0)) <= 1e-6 * model.norm(2.0)


def test_hook_with_dtensors(ranks: Ranks) -> None:
    ranks.run(hooked, SEED)


def failing(seed: int, is_first: bool) -> str:
    """A plain gradient that is refused on one rank, in a group with a norm of its own."""
    model = sharded_model(seed)
    model.add((4, 3))
    if dist.get_rank() == 1:
        model.params[2].grad = torch.ones(4, 3).to_sparse()
    groups = [{"params": model.params[:2], "max_norm": 0.5}, {"params": model.params[2:], "max_norm": 1.0}]
    optimizer = SGD(groups[::-1] if is_first else groups, lr=0.0)
    handle = gradclip_ext.register_clip_hook(optimizer, 1.0)
    before = [part.clone() for part in model.parts()[:2]]
    try:
        optimizer.step()
    except TypeError as error:
        for part, old in zip(model.parts(), before):
            oracle.assert_same_bits(part, old)
        return f"TypeError: {error}"
    return str(plain(handle.total_norm).item())


def test_a_failure_of_one_group_on_one_rank_keeps_nobody_waiting(ranks: Ranks) -> None:
    for is_first in (False, True):
        answers = ranks.run(failing, SEED, is_first)
        assert "sparse" in answers[1] and answers[1].startswith("TypeError")
        assert all(not answers[rank].startswith("TypeError") for rank in (0, 2, 3)), answers


def others_of(params: list[Any]) -> list[Any]:
    """Return other parameters with the same values and gradients."""
    return [oracle.parameter(p.grad.clone()) for p in params]


def other_gradients_on_each_rank(seed: int) -> None:
    """Pipeline stages: the hook, and unscaling, clip by the norm of a pair of ranks."""
    pair = stripe([0, 1], [2, 3])
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    params = [oracle.parameter(torch.randn(size, generator=generator)) for size in ((4, 3), (5,))]
    copies = {"copies": lambda p: 2} if dist.get_rank() > 1 else {}  # of the second pair, the same gradients
    if copies:
        for param in params:
            param.grad.fill_(2.0)
    twins, thirds = others_of(params), others_of(params)
    norm = gradclip_ext.clip_grad_norm_(twins, 0.5, group=pair, **copies)
    optimizer = SGD(params, lr=0.0)
    handle = gradclip_ext.register_clip_hook(optimizer, 0.5, group=pair, **copies)
    optimizer.step()
    oracle.assert_same_bits(handle.total_norm, norm)
    for value in (1.0, math.inf):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))
        for param in thirds:
            param.grad.mul_(1024.0)
        if dist.get_rank() == 1:
            thirds[0].grad.view(-1)[0] *= value
        optimizer = SGD(thirds, lr=0.0)
        found = gradclip_ext.unscale_and_clip_grad_norm_(scaler, optimizer, 0.5, group=pair, **copies)
        flags = [f.item() for f in scaler._found_inf_per_device(optimizer).values()]
        assert flags == [float(math.isinf(value) and dist.get_rank() < 2)]
        if value == 1.0:
            oracle.assert_same_bits(found, norm)
            for one, two, three in zip(params, twins, thirds):
                oracle.assert_same_bits(one.grad, two.grad)
                oracle.assert_same_bits(three.grad, two.grad)


def test_hook_and_unscaling_over_a_group(ranks: Ranks) -> None:
    ranks.run(other_gradients_on_each_rank, SEED)


def fsdp1(seed: int, use_orig_params: bool) -> list[str]:
    """Plain tensors that are parts: nothing but group= tells."""
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler  # noqa: PLC0415

    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    batch = torch.randn(4, 6)
    exact = []
    model(batch).square().sum().backward()
    exact = [p.grad.norm().item() for p in model.parameters()]
    model.zero_grad()
    fsdp = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    optimizer = SGD(fsdp.parameters(), lr=0.0)
    scaler = ShardedGradScaler("cpu", init_scale=1024.0)
    messages = []
    for call in (
        lambda: gradclip_ext.register_clip_hook(optimizer, 0.5),
        lambda: gradclip_ext.unscale_and_clip_grad_norm_(scaler, optimizer, 0.5),
        lambda: gradclip_ext.adaptive_clip_grad_(fsdp.parameters()),
    ):
        try:
            call()
        except (RuntimeError, NotImplementedError) as error:
            messages.append(str(error))
    scaler.scale(fsdp(batch).square().sum()).backward()
    group = fsdp.process_group
    norms = [gradclip_ext.unscale_and_clip_grad_norm_(scaler, optimizer, math.inf, group=group)]
    handle = gradclip_ext.register_clip_hook(optimizer, 0.5, group=group)
    optimizer.step()
    norms += [
        handle.total_norm,
        gradclip_ext.get_total_norm([p.grad for p in fsdp.parameters() if p.grad is not None], group=group),
    ]
    whole = math.hypot(*exact)
    for norm, expected in zip(norms, (whole, whole, 0.5)):
        assert abs(norm.item() / expected - 1) < 1e-5, (norms, whole)
    return messages


def test_fsdp1_needs_a_group(ranks: Ranks) -> None:
    for use_orig_params in (True, False):
        for messages in ranks.run(fsdp1, SEED, use_orig_params):
            assert len(messages) == 3 and all("FSDP1" in message for message in messages), messages
            assert all("group=fsdp.process_group" in message for message in messages[:2]), messages
            assert "fully_shard" in messages[2]
