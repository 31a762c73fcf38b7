"""Which ranks take part and with which weights, for worlds of up to 1,024 ranks, one process each in turn."""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from cases import needs_gloo, seeded
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from gradclip_ext import _layout, clip_grad_norm_
from gradclip_ext._layout import layout_of

pytestmark = needs_gloo


@contextmanager
def rank_of(world_size: int, rank: int) -> Iterator[None]:
    """Be one rank of a world in which nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def pieces(kinds: list[bool], shape: tuple[int, ...]) -> int:
    return math.prod(size for size, is_divided in zip(shape, kinds) if is_divided)


@seeded
@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=3),
    st.sampled_from([1, 2, 3, 5]),
    st.data(),
)
def test_weights_add_up_to_one(shape: list[int], stages: int, data: st.DataObject) -> None:
    """Over all ranks, every gradient counts once: sharded, copied, an expert's, a stage's, a plain one.

    The world is stages x mesh. Each rank's layout is made from what that rank alone sees.
    """
    inner = math.prod(shape)
    world = inner * stages
    kinds = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    expert_dim = data.draw(st.integers(0, len(shape) - 1))
    grid = torch.arange(world).view(stages, *shape)
    counted = {"dense": 0.0, "expert": 0.0, "plain": 0.0}
    for rank in range(world):
        stage, at = divmod(rank, inner)
        coordinates = [int(c) for c in torch.unravel_index(torch.tensor(at), tuple(shape))]
        # The expert's mesh is the rank's own slice along one dimension; across the others experts differ.
        expert_ranks = grid[stage][
            tuple(slice(None) if d == expert_dim else c for d, c in enumerate(coordinates))
        ]
        groups: list[Any] = [grid[(slice(None), *coordinates)]]
        groups += [
            grid[stage][tuple(slice(None) if e == d else c for e, c in enumerate(coordinates))]
            for d in range(len(shape))
            if d != expert_dim
        ]
        found = weights_on(rank, world, grid[stage], expert_ranks, groups, kinds)
        for name, weight in found.items():
            counted[name] += weight
    dense_parts = pieces(kinds, tuple(shape)) * stages
    assert counted["dense"] == pytest.approx(dense_parts)
    experts = stages * math.prod(s for d, s in enumerate(shape) if d != expert_dim)
    assert counted["expert"] == pytest.approx(shape[expert_dim] * experts)
    assert counted["plain"] == pytest.approx(experts)


def weights_on(
    rank: int,
    world: int,
    dense: torch.Tensor,
    expert: torch.Tensor,
    groups: list[torch.Tensor],
    kinds: list[bool],
) -> dict[str, float]:
    joined = _layout._Ranks(rank)
    sets = [frozenset(g.flatten().tolist()) for g in groups]
    joined.add(frozenset(dense.flatten().tolist()), [(0, None)])
    for ranks in sets:
        joined.add(ranks, [(1, None)])
    assert joined.size == world

    def weight(ranks: frozenset[int], parts: int) -> float:
        return parts * _layout._spread(ranks, rank, sets, range(len(sets))) / joined.size

    return {
        "dense": weight(frozenset(dense.flatten().tolist()), pieces(kinds, tuple(dense.shape))),
        "expert": weight(frozenset(expert.tolist()), expert.numel()),
        "plain": weight(frozenset((rank,)), 1),
    }


@pytest.mark.parametrize(
    ("world_size", "shape", "steps"),
    [
        (1024, (1024,), [1024]),
        (1024, (16, 64), [1024]),  # one all-reduce over the world instead of two
        (1024, (4, 8), [8, 4]),  # other models beside this one are not waited for
        (24, (2, 3, 2), [2, 3, 2]),
        (128, (1, 128), [128]),
    ],
)
def test_steps(world_size: int, shape: tuple[int, ...], steps: list[int]) -> None:
    for rank in (0, math.prod(shape) - 1):
        with rank_of(world_size, rank):
            mesh = DeviceMesh("cpu", torch.arange(math.prod(shape)).view(shape))
            layout = layout_of([mesh], None)
            assert layout.size == math.prod(shape)
            assert [layout.group_of(step).size() for step in layout.steps] == steps


def test_groups_in_any_order_take_the_same_steps_on_a_rank_without_parameters() -> None:
    with rank_of(16, 0):
        mesh = DeviceMesh("cpu", torch.arange(8).view(2, 4), mesh_dim_names=("stages", "shards"))
        stages, shards = mesh["stages"], mesh["shards"]
        for groups in ([stages, shards], [shards, stages]):
            with_parameters, without = layout_of([shards], groups), layout_of([], groups)
            sizes = [[x.group_of(step).size() for step in x.steps] for x in (with_parameters, without)]
            assert sizes[0] == sizes[1] == [g.size() for g in groups]


def test_ranks_that_do_not_fit() -> None:
    with rank_of(8, 0):
        triple = DeviceMesh("cpu", torch.tensor([0, 1, 2]))
        pair = DeviceMesh("cpu", torch.tensor([0, 3]))
        across = DeviceMesh("cpu", torch.tensor([0, 1, 5, 6]))
        elsewhere = dist.new_group([4, 5])
        with pytest.raises(ValueError, match=r"ranks \[0, 1, 5, 6\] overlaps ranks \[0, 1, 2\] in part"):
            layout_of([triple], across)
        with pytest.raises(ValueError, match=r"meshes overlap, and none holds the ranks of all"):
            layout_of([triple, pair], ())
        with pytest.raises(TypeError, match="this rank is not a member"):
            layout_of([triple], elsewhere)
        assert layout_of([triple, pair], dist.group.WORLD).size == 8


def test_a_layout_is_made_once_and_keeps_nothing_alive() -> None:
    with rank_of(4, 0):
        before = len(_layout._layouts)
        mesh, group = DeviceMesh("cpu", torch.arange(4).view(2, 2)), dist.new_group([0, 1, 2, 3])
        layout = layout_of([mesh], group)
        assert layout_of([mesh], [group]) is layout
        seen = weakref.ref(mesh)
        del mesh, layout
        gc.collect()
        assert seen() is None
        assert len(_layout._layouts) == before


def test_host_time_does_not_jump_with_a_new_set_of_gradients() -> None:
    """torch's clip of DTensors takes time quadratic in their number for every new set (pytorch#169445)."""
    with rank_of(8, 0):
        mesh = DeviceMesh("cpu", torch.arange(8))
        params = []
        for _ in range(1000):
            params.append(torch.nn.Parameter(DTensor.from_local(torch.zeros(1, 8), mesh, [Shard(0)])))
            params[-1].grad = DTensor.from_local(torch.ones(1, 8), mesh, [Shard(0)])
        params[3].grad = DTensor.from_local(torch.ones(8, 8), mesh, [Replicate()])
        clip_grad_norm_(params, 1e9)
        steady = min(_seconds(params) for _ in range(5))
        first = math.inf
        for index in range(3):
            params[index].grad = None
            first = min(first, _seconds(params))
        assert first < 5 * steady, f"{first:.2e} s for a new set of gradients, {steady:.2e} s for a known one"


def _seconds(params: list[Any]) -> float:
    start = time.perf_counter()
    clip_grad_norm_(params, 1e9)
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("types", "shares_backend", "preferred", "device", "expected"),
    [
        (["cuda"], False, None, "cpu", "cuda"),  # offloaded gradients, and a group of NCCL's alone
        (["cuda"], False, "cuda", "cpu", "cuda"),
        (["cuda", "cpu"], True, None, "cpu", "cpu"),  # gloo takes both
        (["cuda", "cpu"], True, None, "cuda", "cuda"),
        (["cpu", "cuda"], False, None, "cpu", "cuda"),  # two backends: all ranks on one side
        (["cpu", "cuda"], False, "cpu", "cpu", "cpu"),  # a mesh on the CPU
        (["cpu"], False, None, "cuda", "cpu"),
    ],
)
def test_where_a_group_communicates(
    types: list[str], shares_backend: bool, preferred: str | None, device: str, expected: str
) -> None:
    one = object()
    group = mock.Mock(_device_types=[torch.device(kind) for kind in types])
    group._get_backend = lambda on: one if shares_backend else on.type
    found = _layout.communication_device(group, torch.device(device), preferred)
    assert found.type == expected
