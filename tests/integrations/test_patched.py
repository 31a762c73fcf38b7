"""Libraries that need no integration, because the patch reaches the functions of torch that they call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import MAX_NORM, assert_other_weights, assert_same_weights, data, model
from torch import nn

from gradclip_ext import patch_torch


def train_with_skorch(max_norm: float | None) -> nn.Module:
    """skorch's callback has imported torch's function by name."""
    skorch = pytest.importorskip("skorch", reason="skorch is not installed")
    callbacks = pytest.importorskip("skorch.callbacks")
    clipping = [callbacks.GradientNormClipping(max_norm)] if max_norm else []
    inputs, targets = data()
    options = {"max_epochs": 1, "lr": 1.0, "batch_size": 4, "train_split": None, "verbose": 0}
    net = skorch.NeuralNetRegressor(model(), callbacks=clipping, **options)
    net.fit(inputs.numpy(), targets.numpy())
    return net.module_


def train_with_timm(max_norm: float | None) -> nn.Module:
    """timm looks torch's function up in every call."""
    utils = pytest.importorskip("timm.utils", reason="timm is not installed")
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scale = utils.NativeScaler(device="cpu")
    for inputs, targets in zip(*(t.split(4) for t in data())):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(inputs), targets)
        scale(loss, optimizer, clip_grad=max_norm, clip_mode="norm", parameters=list(net.parameters()))
    return net


@pytest.mark.parametrize("train", [train_with_skorch, train_with_timm])
def test_the_patch_reaches_it(
    train: Callable[[float | None], nn.Module], counts: dict[tuple[str, str], int]
) -> None:
    expected, unclipped = train(MAX_NORM), train(None)
    assert_other_weights(expected, unclipped)
    assert not counts
    with patch_torch():
        net = train(MAX_NORM)
    assert_same_weights(net, expected)
    assert sum(counts.values()) == 4
