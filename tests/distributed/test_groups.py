"""Groups across which gradients differ: experts, pipeline stages, Megatron's groups, tied weights."""

from __future__ import annotations

import math
import re
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
from cases import SEED, needs_gloo
from ranks import Ranks
from sharding import Copy, Model, Shard0, Shard1, check_clipped, collectives, group_of, mesh, stripe

import gradclip_ext
from gradclip_ext import distributed

pytestmark = needs_gloo

ORDERS = (2.0, math.inf, 7.0, -1.0)
PAIRS = ((0, 1), (2, 3))
ACROSS = ((0, 2), (1, 3))


class Distributed(Model):
    """A model of which each rank has some of the parameters; ``whole`` knows all of them."""

    def add_on(self, ranks: tuple[int, ...], shape: tuple[int, ...], *sharding: Any) -> None:
        """Add a parameter to some ranks: plain, or a DTensor on a mesh that they share."""
        if dist.get_rank() in ranks:
            self.add(shape, *sharding)
        else:
            self.whole.append(self.random(*shape))
            if sharding:  # each rank's own mesh takes part in making it
                twin = Model(0)
                twin.add(shape, *sharding)


def experts(model: Distributed) -> Any:
    """Dense parameters on all ranks; experts divided over pairs, other ones on each stripe."""
    model.add((8, 3), mesh(2, 2), Shard0, Copy)
    for ranks in ACROSS:
        model.add_on(ranks, (4, 3), mesh(2, 2)["a"], Shard0)
    return {"group": mesh(2, 2)["b"]}


def partial_tensor_parallelism(model: Distributed) -> Any:
    """Some parameters on (dp, tp), others on dp alone: copies across tp."""
    model.add((8, 4), mesh(2, 2), Shard0, Shard1)
    model.add((6, 2), mesh(2, 2)["a"], Shard0)
    return {"group": ()}


def pipeline(model: Distributed) -> Any:
    """Two stages of two ranks each."""
    for ranks in PAIRS:
        model.add_on(ranks, (5, 3), mesh(2, 2)["b"], Shard0)
        model.add_on(ranks, (2,), mesh(2, 2)["b"], Copy)
    return {"group": mesh(2, 2)["a"]}


def pipeline_with_an_empty_stage(model: Distributed) -> Any:
    model.add_on((0, 1), (5, 3), mesh(2, 2)["b"], Shard0)
    return {"group": [mesh(2, 2)["a"], mesh(2, 2)["b"]]}


def megatron(model: Distributed) -> Any:
    """tp x pp of plain tensors: divided weights, and norms that each tensor-parallel rank has."""
    for rank in range(4):
        model.add_on((rank,), (3, 2))
    for ranks in PAIRS:
        model.add_on(ranks, (4,))
    duplicated = [p for p in model.params if p.shape == (4,)]
    copies = {id(p): 2 for p in duplicated}
    return {"group": [stripe(*PAIRS), stripe(*ACROSS)], "copies": lambda p: copies.get(id(p), 1)}


def tied_embeddings(model: Distributed) -> Any:
    """Four pipeline stages; the first and the last one have the same embedding."""
    for rank in range(4):
        model.add_on((rank,), (3, 2))
    model.add_on((0, 3), (5, 2))
    return {"group": dist.group.WORLD, "copies": lambda p: 2 if p.shape == (5, 2) else 1}


def a_part_of_the_world(model: Distributed) -> Any:
    """Two models beside each other: each pair of ranks has its own, and does not wait for the other."""
    ranks = next(r for r in PAIRS if dist.get_rank() in r)
    for rank in ranks:
        if dist.get_rank() == rank:
            model.add((3, 2))
        else:
            model.whole.append(model.random(3, 2))
    return {"group": stripe(*PAIRS)}


def fsdp1(model: Distributed) -> Any:
    for rank in range(4):
        model.add_on((rank,), (6,))
    return {"group": dist.group.WORLD}


# What each sends: ranks of every all-reduce.
CASES: dict[str, tuple[Any, list[int]]] = {
    "experts": (experts, [4]),
    "partial tensor parallelism": (partial_tensor_parallelism, [4]),
    "pipeline": (pipeline, [4]),
    "pipeline with an empty stage": (pipeline_with_an_empty_stage, [4]),
    "Megatron": (megatron, [4]),
    "tied embeddings": (tied_embeddings, [4]),
    "a part of the world": (a_part_of_the_world, [2]),
    "FSDP1": (fsdp1, [4]),
}


def on_rank(name: str, seed: int) -> list[Any]:
    results = []
    for norm_type in ORDERS:
        model = Distributed(seed)
        options = CASES[name][0](model)
        count = distributed.count_elements(model.params, **options)
        assert int(count) == sum(w.numel() for w in model.whole) and count.dtype == torch.int64
        distributed.warm_up(model.params, group=options["group"])
        grads = {p.grad: p for p in model.params}
        of_grads = dict(options)
        if "copies" in options:
            of_grads["copies"] = lambda grad, grads=grads, copies=options["copies"]: copies(grads[grad])
        with collectives() as sent:
            norm = gradclip_ext.get_total_norm(list(grads), norm_type, **of_grads)
        if model.params:
            bits, again = check_clipped(model, norm_type, 1e-2, **options)
            assert again == sent
        else:
            bits = gradclip_ext.clip_grad_norm_([], 1e-2, norm_type, **options).numpy().tobytes()
        results.append((norm_type, bits, norm.numpy().tobytes(), sent))
    return results


@pytest.mark.parametrize("name", CASES)
def test_groups(ranks: Ranks, name: str) -> None:
    results = ranks.run(on_rank, name, SEED)
    for alike in zip(*results):
        teams = [alike[:2], alike[2:]] if name == "a part of the world" else [alike]
        for team in teams:
            assert len({bits for _, *both, _ in team for bits in both}) == 1, team
        for norm_type, *_, sent in alike:
            steps = CASES[name][1] * (1 if norm_type in (2.0, math.inf) else 2)
            assert sent == [("all_reduce", 8, size) for size in steps], (norm_type, sent)


# ---------------------------------------------------------------- errors


def raised(name: str) -> str:
    """Return the error of a call, which has to leave the gradients alone and nobody waiting."""
    model = Model(3)
    options: dict[str, Any] = {}
    if name == "nothing said":
        model.add((8, 3), mesh(2, 2), Shard0, Copy)
        model.add((4, 3), mesh(2, 2)["a"], Shard0)
    elif name == "overlap":
        model.add((4, 3))
        triples = group_of(0, 1, 2), group_of(0, 2, 3)
        options["group"] = [stripe(*PAIRS), triples[dist.get_rank() in (0, 3)]]  # 2 is in both
    elif name == "not a member":
        model.add((4, 3))
        options["group"] = group_of(0, 1) if dist.get_rank() > 1 else group_of(2, 3)
    elif name == "no group":
        model.add((4, 3))
        options["group"] = 3
    elif name in WRONG_GROUPS:
        model.add((4, 3))
        options |= WRONG_GROUPS[name]
    elif name == "a number as copies":
        model.add((4, 3))
        options |= {"group": dist.group.WORLD, "copies": 2}
    elif name == "copies alone":
        model.add((4, 3))
        options["copies"] = lambda p: 1
    elif name == "copies of 0":
        model.add((4, 3))
        options |= {"group": dist.group.WORLD, "copies": lambda p: 0}
    elif name == "more copies than ranks":
        model.add((4, 3))
        options |= {"group": dist.group.WORLD, "copies": lambda p: 5}
    elif name == "order 0":
        model.add((4, 3))
        options |= {"group": dist.group.WORLD, "norm_type": 0.0}
    with oracle.unchanged(model.parts()):
        try:
            gradclip_ext.clip_grad_norm_(model.params, 1e-3, **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing raised"


WRONG_GROUPS: dict[str, Any] = {
    "ranks": {"group": [0, 1]},
    "text": {"group": "pp"},
    "tensors": {"group": [torch.zeros(2)]},
}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (
            "nothing said",
            r"ValueError: .*different ranks, ranks \[0, 1, 2, 3\] and ranks \[., .\].*group=\(\)",
        ),
        ("not a member", "TypeError: group must be .*this rank is not a member"),
        ("no group", "TypeError: group must be a ProcessGroup, a DeviceMesh or a sequence of these, got 3"),
        ("ranks", r"TypeError: group must be .*got 0 of type int: pass torch.distributed.new_group\(...\)"),
        ("text", r"TypeError: group must be .*got 'pp' of type str: pass mesh\['pp'\]"),
        ("tensors", r"TypeError: group must be .*got a tensor of torch.float32 and shape \(2,\)"),
        ("a number as copies", "TypeError: copies must be a function .*got 2 of type int: pass for instance"),
        ("copies alone", "ValueError: copies was passed without group"),
        ("copies of 0", "ValueError: copies returned 0 for tensor 0"),
        ("more copies than ranks", "ValueError: copies returned 5"),
        ("order 0", "NotImplementedError: norm_type=0 counts whole tensors"),
    ],
)
def test_errors_on_every_rank(ranks: Ranks, name: str, error: str) -> None:
    for message in ranks.run(raised, name):
        assert re.match(error, message), message
