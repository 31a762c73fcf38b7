"""Parameters with DTensor gradients whose whole values every rank knows, and checks of what clipping does."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import oracle
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import gradclip_ext
from gradclip_ext import reference


@functools.cache
def mesh(*shape: int) -> DeviceMesh:
    """Return a mesh over the world; its dimensions are called a, b, ... from the outermost."""
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))


@functools.cache
def group_of(*ranks: int) -> Any:
    """Return the process group of these ranks; every rank has to ask for it, in the same order."""
    return dist.new_group(list(ranks))


def stripe(*groups: Sequence[int]) -> Any:
    """Return this rank's group among several that divide the world."""
    found = [group_of(*ranks) for ranks in groups]
    return next(g for g, ranks in zip(found, groups) if dist.get_rank() in ranks)


class Model:
    """Parameters of this rank, and the whole gradients of which theirs are parts.

    Args:
        seed: the same on all ranks.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.params: list[torch.nn.Parameter] = []
        self.whole: list[Tensor] = []

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return values of both signs over about three decades, none of them zero."""
        uniform = torch.rand(2, *shape, generator=self.generator, dtype=torch.float64)
        values = (uniform[0] - 0.5).sign() * torch.exp(uniform[1] * 7.0 - 4.0)
        return torch.complex(values, values.flip(0)).to(dtype) if dtype.is_complex else values.to(dtype)

    def add(
        self, shape: tuple[int, ...], on: DeviceMesh | None = None, *placements: Any, **options: Any
    ) -> None:
        """Add a parameter whose gradient lies on a mesh, or is plain and the same on all ranks."""
        if on is None:
            self.whole.append(self.random(*shape, **options))
            self.params.append(oracle.parameter(self.whole[-1].clone()))
            return
        kept = [Replicate() if type(p) is Partial else p for p in placements]
        sizes = [on.size(dim) if type(p) is Partial else 1 for dim, p in enumerate(placements)]
        addends = [self.random(*shape, **options) for _ in range(math.prod(sizes))]
        if len(addends) > 1:  # multiples of 2^-12, which float32 adds without rounding: they may cancel
            addends = [
                ((a * 4096.0).round() / 4096.0).to(addends[0].dtype) for a in map(oracle.wide, addends)
            ]
        coordinate = on.get_coordinate()
        own = 0
        if coordinate is not None:
            for size, at in zip(sizes, coordinate):
                own = own * size + (at if size > 1 else 0)
        averaged = math.prod(
            on.size(d) for d, p in enumerate(placements) if getattr(p, "reduce_op", "") == "avg"
        )
        whole = torch.stack([oracle.wide(a) for a in addends]).sum(0) / averaged
        part = [distributed_part(addend, on, kept) for addend in addends][own]  # sends rank 0's
        like = {"shape": addends[0].shape, "stride": addends[0].stride(), "run_check": False}
        param = torch.nn.Parameter(DTensor.from_local(torch.zeros_like(part), on, kept, **like))
        param.grad = DTensor.from_local(part, on, placements, **like)
        self.params.append(param)
        self.whole.append(whole if len(addends) > 1 else addends[0])

    def parts(self) -> list[Tensor]:
        """Return the memory of this rank's gradients."""
        return [local(p.grad) for p in self.params if p.grad is not None]

    def norm(self, norm_type: float) -> float:
        return reference.total_norm(self.whole, norm_type)


def distributed_part(whole: Tensor, on: DeviceMesh, placements: list[Any]) -> Tensor:
    """Return what of a tensor lies on this rank, as memory of its own."""
    if whole.is_complex():  # gloo of torch 2.6 sends none
        pair = [distributed_part(half.contiguous(), on, placements) for half in (whole.real, whole.imag)]
        return torch.complex(*pair)
    return distribute_tensor(whole, on, placements).to_local().clone()


def local(tensor: Any) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def plain(tensor: Tensor) -> Tensor:
    """Return a norm as a plain tensor; a DTensor has to be replicated."""
    if isinstance(tensor, DTensor):
        assert all(type(p) is Replicate for p in tensor.placements), tensor.placements
    return local(tensor)


@contextlib.contextmanager
def collectives() -> Iterator[list[tuple[str, int, int]]]:
    """Record the collectives of the block: name, bytes that are sent, ranks."""
    found: list[tuple[str, int, int]] = []
    with contextlib.ExitStack() as stack:
        for name in ("all_reduce",):
            original = getattr(dist, name)

            def recorded(tensor: Tensor, op: Any, group: Any, name: str = name, call: Any = original) -> Any:
                found.append((name, tensor.numel() * tensor.element_size(), group.size()))
                return call(tensor, op, group)

            stack.enter_context(mock.patch.object(dist, name, recorded))
        from gradclip_ext import _dtensors  # noqa: PLC0415

        scatter = _dtensors._reduce_scatter

        def scattered(output: Tensor, tensor: Tensor, group: Any) -> Any:
            found.append(("reduce_scatter", tensor.numel() * tensor.element_size(), group.size()))
            return scatter(output, tensor, group=group)

        stack.enter_context(mock.patch.object(_dtensors, "_reduce_scatter", scattered))
        yield found


def check_clipped(model: Model, norm_type: float, max_norm: float, **options: Any) -> tuple[bytes, list[Any]]:
    """Clip and check norm, gradients and identities; return the norm's bits and the collectives."""
    before = [part.clone() for part in model.parts()]
    grads = [p.grad for p in model.params]
    addresses = [part.data_ptr() for part in model.parts()]
    with collectives() as sent:
        norm = gradclip_ext.clip_grad_norm_(model.params, max_norm, norm_type, **options)
    total = plain(norm)
    check_norm(total, model, norm_type)
    oracle.assert_scaled(model.parts(), before, total, max_norm)
    assert all(p.grad is g for p, g in zip(model.params, grads))
    assert addresses == [part.data_ptr() for part in model.parts()]
    return total.numpy().tobytes(), sent


def check_norm(norm: Tensor, model: Model, norm_type: float) -> None:
    exact = model.norm(norm_type)
    assert norm.shape == () and norm.dtype == oracle.result_dtype(model.parts()), norm
    oracle.assert_same_specials(norm.double(), torch.tensor(exact, dtype=torch.float64))
    if math.isfinite(exact):
        assert abs(norm.double().item() - exact) <= 1e-6 * exact, f"{norm.item()} instead of {exact}"


Shard0, Shard1, Copy, Sum, Avg = Shard(0), Shard(1), Replicate(), Partial(), Partial("avg")
Strided = _StridedShard(0, split_factor=2)
