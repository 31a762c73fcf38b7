"""torchtitan: its function and ours, on the same DTensors, over gloo."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from models import model
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

utils = pytest.importorskip("torchtitan.distributed.utils", reason="torchtitan is not installed")

from gradclip_ext.integrations import torchtitan  # noqa: E402


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(pipeline: bool) -> tuple[nn.Module, dict[str, object]]:
    """Return a sharded model with gradients; of a pipeline, each pair of ranks has a stage of its own."""
    mesh = init_device_mesh("cpu", (2, 2) if pipeline else (1, 4), mesh_dim_names=("pp", "fsdp"))
    net = model()
    fully_shard(net[0], mesh=mesh["fsdp"])
    fully_shard(net, mesh=mesh["fsdp"])
    torch.manual_seed(mesh["pp"].get_local_rank())
    net(torch.randn(8, 6)).square().sum().backward()
    return net, {"pp_mesh": mesh["pp"]} if pipeline else {}


def same_as_torchtitan(pipeline: bool, norm_type: float) -> None:
    net, options = sharded(pipeline)
    before = [p.grad.clone() for p in net.parameters()]
    theirs = whole(utils.clip_grad_norm_(net.parameters(), 0.1, norm_type, **options))
    expected = [whole(p.grad) for p in net.parameters()]
    for parameter, grad in zip(net.parameters(), before):
        parameter.grad = grad
    torchtitan.patch()
    try:
        torchtitan.patch()
        ours = utils.clip_grad_norm_(net.parameters(), 0.1, norm_type, **options)
    finally:
        torchtitan.unpatch()
    assert utils.clip_grad_norm_ is not torchtitan.clip_grad_norm_
    torchtitan.unpatch()
    assert type(ours) is Tensor
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for parameter, grad in zip(net.parameters(), expected):
        torch.testing.assert_close(whole(parameter.grad), grad, rtol=1e-5, atol=1e-8)
    everyone = [torch.zeros(()) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, ours)
    assert len(set(map(float, everyone))) == 1


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("pipeline", [False, True])
def test_the_same_norm_and_gradients(ranks: Ranks, pipeline: bool, norm_type: float) -> None:
    ranks.run(same_as_torchtitan, pipeline, norm_type, timeout=120.0)
