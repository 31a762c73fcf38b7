"""DeepSpeed: engines with and without its clipping fused, on the same data, over gloo."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from models import MAX_NORM, STEPS, assert_other_weights, assert_same_weights, data, model
from ranks import WORLD_SIZE, Ranks
from torch import nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

from gradclip_ext.integrations.deepspeed import fuse  # noqa: E402


def engine_of(stage: int, precision: str, clipping: float) -> Any:
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())  # which DeepSpeed insists on
    net = model()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": clipping,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]


def train(stage: int, precision: str, clipping: float, fused: bool) -> tuple[nn.Module, list[float]]:
    engine = engine_of(stage, precision, clipping)
    if fused:
        fuse(engine)
    norms = []
    dtype = next(engine.module.parameters()).dtype
    rank = torch.distributed.get_rank()
    inputs, targets = (t.chunk(WORLD_SIZE)[rank].to(dtype) for t in data(4 * STEPS * WORLD_SIZE))
    for x, y in zip(inputs.split(4), targets.split(4)):
        engine.backward(nn.functional.mse_loss(engine(x).float(), y.float()))
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return engine.module.float(), norms


def same_as_deepspeed(stage: int, precision: str) -> None:
    module, norms = train(stage, precision, MAX_NORM, fused=True)
    expected, their_norms = train(stage, precision, MAX_NORM, fused=False)
    unclipped, _ = train(stage, precision, 0.0, fused=False)
    assert norms == pytest.approx(their_norms, rel=1e-5 if precision == "fp32" else 1e-2)
    assert_same_weights(module, expected, atol=1e-6 if precision == "fp32" else 1e-3)
    assert_other_weights(module, unclipped)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_same_norms_and_weights(ranks: Ranks, stage: int, precision: str) -> None:
    ranks.run(same_as_deepspeed, stage, precision, timeout=180.0)


def refuses_other_stages() -> None:
    with pytest.raises(TypeError, match="stages 1 and 2"):
        fuse(engine_of(0, "fp32", 1.0))


def test_other_stages_are_refused(ranks: Ranks) -> None:
    ranks.run(refuses_other_stages, timeout=120.0)
