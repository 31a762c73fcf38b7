"""Real models: fully_shard, HSDP, tensor parallelism, FSDP1; the recipes of README; torch.compile."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import oracle
import pytest
import test_groups
import torch
import torch.distributed as dist
from cases import SEED, needs_gloo
from ranks import Ranks
from sharding import check_norm, collectives, local, mesh, plain
from subprocesses import TESTS
from test_groups import Distributed
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import gradclip_ext
from gradclip_ext import distributed, reference

pytestmark = [
    needs_gloo,
    pytest.mark.skipif(
        not hasattr(torch.cpu.Stream, "record_event"),
        reason="no fully_shard on the CPU in this torch",
    ),
]

README = TESTS.parent / "README.md"

Wrap = Callable[[nn.Module], tuple[nn.Module, dict[str, Any]]]


def original() -> nn.Module:
    """Return a model of 76 elements: FSDP1 pads its flat parameter to a multiple of the ranks."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2, bias=False), nn.LayerNorm(2))


def with_fully_shard(model: nn.Module, on: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    fully_shard(model[0], mesh=on)
    fully_shard(model, mesh=on)
    return model


def with_tensor_parallelism(model: nn.Module, whole: bool) -> nn.Module:
    from torch.distributed.tensor.parallel import (  # noqa: PLC0415
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan: dict[str, Any] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if not whole:
        plan = {"0": ColwiseParallel(output_layouts=Replicate())}
    return parallelize_module(model, mesh(2, 2)["b"], plan)


def fsdp1(model: nn.Module, use_orig_params: bool) -> tuple[nn.Module, dict[str, Any]]:
    from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415

    fsdp = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    return fsdp, {"group": fsdp.process_group}


MODELS: dict[str, Wrap] = {
    "fully_shard": lambda m: (with_fully_shard(m, mesh(4)), {}),
    "HSDP": lambda m: (with_fully_shard(m, mesh(2, 2)), {}),
    "FSDP + TP": lambda m: (
        with_fully_shard(with_tensor_parallelism(m, whole=True), mesh(2, 2)["a"]),
        {"group": ()},  # LayerNorm's parameters lie on the data-parallel mesh alone
    ),
    "FSDP + TP of one layer": lambda m: (
        with_fully_shard(with_tensor_parallelism(m, whole=False), mesh(2, 2)["a"]),
        {"group": ()},
    ),
    "FSDP1, original parameters": lambda m: fsdp1(m, True),
    "FSDP1, flat parameters": lambda m: fsdp1(m, False),
}


def train(name: str, norm_type: float) -> tuple[bytes, list[tuple[str, int, int]]]:
    reference_model = original()
    model, options = MODELS[name](copy.deepcopy(reference_model))
    torch.manual_seed(8)
    batch = torch.randn(4, 6)  # the same on all ranks, so that averages are the reference's gradients
    reference_model(batch).square().sum().backward()
    model(batch).square().sum().backward()
    exact = reference.total_norm([p.grad for p in reference_model.parameters()], norm_type)
    params = list(model.parameters())
    count = distributed.count_elements(params, **options)
    assert int(count) == sum(p.numel() for p in reference_model.parameters())
    before = [local(p.grad).clone() for p in params if p.grad is not None]
    with collectives() as sent:
        norm = plain(gradclip_ext.clip_grad_norm_(params, exact / 2, norm_type, **options))
    # The two backward passes round differently.
    assert abs(norm.item() / exact - 1) < 1e-5, (norm.item(), exact)
    for p, old in zip([p for p in params if p.grad is not None], before):
        torch.testing.assert_close(local(p.grad), old * 0.5, rtol=1e-4, atol=1e-6)
    return norm.numpy().tobytes(), sent


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("name", MODELS)
def test_model(ranks: Ranks, name: str, norm_type: float) -> None:
    answers = ranks.run(train, name, norm_type)
    assert len({bits for bits, _ in answers}) == 1
    assert all(sent == [("all_reduce", 8, 4)] for _, sent in answers), answers


def as_fsdp1_does(use_orig_params: bool) -> None:
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(dist.get_rank()))
    results = []
    for ours in (True, False):
        fsdp, options = fsdp1(original(), use_orig_params)
        fsdp(batch).square().sum().backward()
        if ours:
            norm = gradclip_ext.clip_grad_norm_(fsdp.parameters(), 0.1, **options)
        else:
            norm = fsdp.clip_grad_norm_(0.1)
        results.append([norm, *(p.grad for p in fsdp.parameters() if p.grad is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_clips_alike(ranks: Ranks, use_orig_params: bool) -> None:
    ranks.run(as_fsdp1_does, use_orig_params)


# ---------------------------------------------------------------- torch.compile


def compiled(norm_type: float) -> None:
    model = with_fully_shard(original(), mesh(4))
    model(torch.randn(4, 6)).square().sum().backward()
    params = list(model.parameters())
    before = [local(p.grad).clone() for p in params]

    @torch.compile(fullgraph=True, dynamic=False, backend="eager")
    def clip() -> torch.Tensor:
        return gradclip_ext.clip_grad_norm_(params, 1e-2, norm_type)

    norm = plain(clip())
    after = [local(p.grad).clone() for p in params]
    for p, old in zip(params, before):
        local(p.grad).copy_(old)
    eager = plain(gradclip_ext.clip_grad_norm_(params, 1e-2, norm_type))
    torch.testing.assert_close(norm, eager)
    for p, clipped in zip(params, after):
        torch.testing.assert_close(local(p.grad), clipped)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="this torch does not trace its own clip_grad_norm_ of DTensors",
)
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_compile(ranks: Ranks, norm_type: float) -> None:
    """Under torch.compile, DTensors are torch's."""
    ranks.run(compiled, norm_type)


# ---------------------------------------------------------------- the recipes of README


def readme_recipes() -> list[str]:
    """Return every call of the package's clip_grad_norm_ in README's table of other tools."""
    if not README.exists():
        return []
    section = README.read_text(encoding="utf-8").split("## Beside other tools")[1].split("\n## ")[0]
    return re.findall(r"`(clip_grad_norm_\((?!accelerator)[^`]+\))`", section)


def run_recipe(recipe: str, seed: int) -> None:
    names: dict[str, Any] = {"clip_grad_norm_": gradclip_ext.clip_grad_norm_, "max_norm": 1e-2}
    model = Distributed(seed)
    if "tp_size" in recipe:
        names["tp"], names["pp"] = test_groups.megatron(model)["group"]
        names["tp_size"] = 2
        for param in model.params:
            param.tensor_model_parallel = param.shape != (4,)
    elif "ep_mesh" in recipe:
        names["ep_mesh"] = test_groups.experts(model)["group"]
    elif "pp_mesh" in recipe:
        names["pp_mesh"] = test_groups.pipeline(model)["group"]
    elif "group=()" in recipe:
        test_groups.partial_tensor_parallelism(model)
    elif "fsdp." in recipe:
        names["fsdp"] = mock.Mock(process_group=test_groups.fsdp1(model)["group"])
        names["fsdp"].parameters = lambda: model.params
    else:
        model.add((8, 4), mesh(2, 2), Replicate(), Shard(0))
    names["model"] = mock.Mock(parameters=lambda: model.params)
    before = [part.clone() for part in model.parts()]
    norm = plain(eval(recipe, names))
    check_norm(norm, model, 2.0)
    oracle.assert_scaled(model.parts(), before, norm, 1e-2)


@pytest.mark.skipif(not README.exists(), reason="there is no README.md beside the tests")
def test_recipes(ranks: Ranks) -> None:
    recipes = readme_recipes()
    assert len(recipes) == 6
    for recipe in recipes:
        ranks.run(run_recipe, recipe, SEED)
