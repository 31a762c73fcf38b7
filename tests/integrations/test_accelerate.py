"""accelerate: its own clip_grad_norm_ under the patch, and the function that takes all arguments."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from models import MAX_NORM, assert_other_weights, assert_same_weights, data, model
from torch import nn

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from gradclip_ext import patch_torch  # noqa: E402
from gradclip_ext.integrations.accelerate import clip_grad_norm_  # noqa: E402


def train(clip: Any) -> nn.Module:
    accelerator = accelerate.Accelerator(cpu=True)
    net = model()
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0))
    for inputs, targets in zip(*(t.split(4) for t in data())):
        accelerator.backward(nn.functional.mse_loss(net(inputs), targets))
        clip(accelerator, list(net.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    return net


@pytest.fixture
def expected() -> nn.Module:
    net = train(lambda accelerator, parameters: accelerator.clip_grad_norm_(parameters, MAX_NORM))
    assert_other_weights(net, train(lambda accelerator, parameters: None))
    return net


def test_the_patch_reaches_its_method(expected: nn.Module, counts: dict[tuple[str, str], int]) -> None:
    with patch_torch():
        net = train(lambda accelerator, parameters: accelerator.clip_grad_norm_(parameters, MAX_NORM))
    assert_same_weights(net, expected)
    assert sum(counts.values()) >= 4


def test_the_function_clips_with_all_options(expected: nn.Module) -> None:
    limits: list[float] = []

    def limit(norm: torch.Tensor) -> float:
        limits.append(norm.item())
        return MAX_NORM

    net = train(lambda accelerator, parameters: clip_grad_norm_(accelerator, parameters, limit))
    assert_same_weights(net, expected)
    assert len(limits) == 4
    net = train(lambda *given: clip_grad_norm_(*given, MAX_NORM, zero_if_nonfinite=True, backend="foreach"))
    assert_same_weights(net, expected)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_what_clips_by_itself_is_refused(kind: str) -> None:
    accelerator = mock.Mock(distributed_type=accelerate.DistributedType[kind])
    with pytest.raises(NotImplementedError, match=r"accelerator\.clip_grad_norm_"):
        clip_grad_norm_(accelerator, [], 1.0)
    accelerator.unscale_gradients.assert_not_called()


def test_fsdp1_needs_its_group() -> None:
    accelerator = mock.Mock(distributed_type=accelerate.DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(ValueError, match=r"group=model\.process_group"):
        clip_grad_norm_(accelerator, [], 1.0)
    accelerator.is_fsdp2 = True
    assert clip_grad_norm_(accelerator, [], 1.0) == 0.0
    accelerator.unscale_gradients.assert_called_once()
