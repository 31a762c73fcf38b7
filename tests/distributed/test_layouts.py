"""Every layout of DTensors on four ranks: norm, gradients, bits, and what travels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import SEED, needs_gloo
from ranks import Ranks
from sharding import Avg, Copy, Model, Shard0, Shard1, Strided, Sum, check_clipped, mesh, plain

import gradclip_ext
from gradclip_ext import _dtensors, _layout

pytestmark = needs_gloo

ORDERS = (2.0, 1.0, math.inf, 3.0, 0.5, -math.inf, -1.0, 8.0)
# (5, 3) is divided unevenly, (1, 6) leaves ranks empty.
SHAPES = ((8, 4), (5, 3), (1, 6), (7,), (0, 4), (6, 2, 2))


def everywhere(
    *placements: Any, on: tuple[int, ...] = (4,), shapes: Any = SHAPES
) -> Callable[[Model, Any], None]:
    def fill(model: Model, dtype: torch.dtype) -> None:
        for shape in shapes:
            # _StridedShard and Shard(1) need as many dimensions.
            fits = [Shard0 if p is Shard1 and len(shape) < 2 else p for p in placements]
            model.add(shape, mesh(*on), *fits, dtype=dtype)

    return fill


def mixed(model: Model, dtype: torch.dtype) -> None:
    """Two meshes over the same ranks, plain tensors, other dtypes."""
    model.add((8, 4), mesh(4), Shard0, dtype=dtype)
    model.add((5, 3), mesh(2, 2), Shard0, Copy, dtype=torch.bfloat16)
    model.add((4, 4), mesh(2, 2), Copy, Shard1, dtype=dtype)
    model.add((3,), dtype=torch.float32)
    model.add((6,), mesh(4), Copy, dtype=dtype)
    model.add((9,), mesh(4), Sum, dtype=dtype)


LAYOUTS: dict[str, Callable[[Model, Any], None]] = {
    "Shard(0)": everywhere(Shard0),
    "Shard(1)": everywhere(Shard1),
    "Replicate": everywhere(Copy),
    "Partial": everywhere(Sum),
    "Partial(avg)": everywhere(Avg),
    "HSDP": everywhere(Copy, Shard0, on=(2, 2)),
    "FSDP + TP": everywhere(Shard0, Shard1, on=(2, 2), shapes=[(8, 4), (5, 3), (1, 6)]),
    "FSDP + TP, one dimension twice": everywhere(Strided, Shard0, on=(2, 2), shapes=[(8, 4), (4, 2)]),
    "Replicate twice": everywhere(Copy, Copy, on=(2, 2)),
    "Shard, Partial": everywhere(Shard0, Sum, on=(2, 2)),
    "Partial, Shard": everywhere(Avg, Shard0, on=(2, 2)),
    "Partial twice": everywhere(Sum, Avg, on=(2, 2)),
    "Replicate, Partial": everywhere(Copy, Sum, on=(2, 2)),
    "mesh of one row": everywhere(Copy, Shard0, on=(1, 4)),
    "mixed": mixed,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


def on_rank(name: str, seed: int, orders: tuple[float, ...], dtypes: tuple[torch.dtype, ...]) -> list[Any]:
    results = []
    for dtype in dtypes:
        for norm_type in orders:
            for max_norm in (1e-2, 1e9):
                model = Model(seed)
                LAYOUTS[name](model, dtype)
                try:
                    results.append((norm_type, *check_clipped(model, norm_type, max_norm)))
                except AssertionError as error:
                    raise AssertionError(f"{name}, p = {norm_type}, {dtype}: {error}") from error
    return results


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(ranks: Ranks, name: str) -> None:
    sums = sum(p in name for p in ("Partial", "mixed"))
    for dtypes, orders in (((torch.float32,), ORDERS), (DTYPES[1:4], (2.0, math.inf, 1.0))):
        results = ranks.run(on_rank, name, SEED, orders, dtypes)
        for alike in zip(*results):
            norm_type, bits, sent = alike[0]
            assert all(other[1] == bits for other in alike), "the norm's bits differ between ranks"
            all_reduces = [s for s in sent if s[0] == "all_reduce"]
            scatters = [s for s in sent if s[0] != "all_reduce"]
            needs_two = math.isfinite(norm_type) and not 0 < norm_type <= 6
            assert [(size, of) for _, size, of in all_reduces] == [(8, 4)] * (1 + needs_two), sent
            expected = {"Partial twice": 2}.get(name, min(sums, 1))
            assert len(scatters) == expected, sent


def test_complex(ranks: Ranks) -> None:
    for name in ("Shard(0)", "HSDP"):
        ranks.run(on_rank, name, SEED, (2.0, 1.0, math.inf), (torch.complex64,))


def in_buckets(seed: int, dtype: torch.dtype) -> list[tuple[str, int, int]]:
    model = Model(seed)
    for shape, placement in (((5, 3), Sum), ((2, 2), Avg), ((0, 4), Sum), ((7,), Sum), ((40,), Sum)):
        model.add(shape, mesh(4), placement, dtype=dtype)
    with mock.patch.object(_dtensors, "_SUMMED", 16):
        return check_clipped(model, 2.0, 1e-2)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_partial_gradients_are_summed_a_bucket_at_a_time(ranks: Ranks, dtype: torch.dtype) -> None:
    """Of 16 elements here, or of one larger tensor; in float32, with padding to four equal pieces."""
    for sent in ranks.run(in_buckets, SEED, dtype):
        assert sent == [("reduce_scatter", 4 * numel, 4) for numel in (16, 12, 40)] + [("all_reduce", 8, 4)]


# ---------------------------------------------------------------- the checks find what they are there for


def nan_on_one_rank(rank_with_nan: int, norm_type: float) -> float:
    model = Model(1)
    LAYOUTS["Shard(0)"](model, torch.float32)
    if dist.get_rank() == rank_with_nan:
        model.parts()[0].view(-1)[0] = math.nan
    if dist.get_rank() == 3 - rank_with_nan:
        model.parts()[0].view(-1)[0] = 1e30
    return float(plain(gradclip_ext.clip_grad_norm_(model.params, 1.0, norm_type)))


@pytest.mark.parametrize("norm_type", ORDERS)
def test_nan_reaches_every_rank(ranks: Ranks, norm_type: float) -> None:
    for rank in range(4):
        norms = ranks.run(nan_on_one_rank, rank, norm_type)
        assert all(map(math.isnan, norms)), norms


def with_planted_bug(bug: str, name: str, norm_type: float) -> bool:
    """Return whether the checks notice a bug."""
    original = _layout.Layout.all_reduce

    def float_max(self: Any, value: Any, op: Any) -> Any:
        if value.dtype == torch.int64:
            return original(self, value.view(torch.float64), op).view(torch.int64)
        return original(self, value, op)

    planted = {
        "weight 1": mock.patch.object(_layout.Layout, "weight", lambda *args: 1.0),
        "no all-reduce": mock.patch.object(_layout.Layout, "all_reduce", lambda self, value, op: value),
        "float MAX": mock.patch.object(_layout.Layout, "all_reduce", float_max),
    }
    model = Model(1)
    LAYOUTS[name](model, torch.float32)
    with planted[bug]:
        if bug == "float MAX":
            return not all(math.isnan(nan_on_one_rank(rank, norm_type)) for rank in range(4))
        try:
            check_clipped(model, norm_type, 1e-2)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize(
    ("bug", "name", "norm_type"),
    [
        ("weight 1", "HSDP", 2.0),
        ("weight 1", "Replicate", 1.0),
        ("no all-reduce", "Shard(0)", 2.0),
        ("no all-reduce", "Shard(0)", math.inf),
        ("float MAX", "Shard(0)", math.inf),
    ],
)
def test_planted_bugs_are_found(ranks: Ranks, bug: str, name: str, norm_type: float) -> None:
    assert any(ranks.run(with_planted_bug, bug, name, norm_type))
