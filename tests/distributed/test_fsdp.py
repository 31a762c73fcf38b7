"""Hooks and clamping on modules of FSDP, both of its generations."""

from __future__ import annotations

import re

import pytest
import torch
from cases import needs_gloo
from subprocesses import run_python

FSDP_SCRIPT = """
import sys, warnings
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
import gradclip_ext

warnings.filterwarnings("ignore")
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
if sys.argv[1] == "fully_shard":
    fully_shard(model[0], mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
else:
    flat = sys.argv[1] == "one flat parameter"
    model = FullyShardedDataParallel(model, use_orig_params=not flat, device_id=torch.device("cpu"))
try:
    print("hooks", len(gradclip_ext.register_clamp_hook(model, -0.01, 0.02)))
except RuntimeError as error:
    print(error)
model(torch.ones(2, 4)).sum().backward()
grads = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]
print("clamped", all(g.max() <= 0.02 for g in grads))
gradclip_ext.clamp_grad_(model.parameters(), -0.01, 0.02)
print("clamped", all(g.max() <= 0.02 for g in grads))
"""


@needs_gloo
@pytest.mark.parametrize(
    ("wrapping", "registered", "clamped"),
    [
        ("fully_shard", "Sequential is or holds .* never run: call clamp_grad_.* after backward", False),
        ("original parameters", "a parameter of shape .* is part of FSDP's flat one.* never run", False),
        ("one flat parameter", "hooks 1", True),
    ],
)
def test_where_fsdp_would_never_run_a_hook(wrapping: str, registered: str, clamped: bool) -> None:
    """Nothing tells that a hook has not run; clamping after backward works all the same."""
    if wrapping == "fully_shard" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch's fully_shard does not run on the CPU")
    printed = run_python("-c", FSDP_SCRIPT, wrapping, timeout=120).splitlines()
    out = [line for line in printed if not line.startswith("[Gloo]")]
    assert re.search(registered, out[0]), out
    assert out[1:] == [f"clamped {clamped}", "clamped True"]
