"""transformers: the Trainer's own clipping under the patch, and the callback in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MAX_NORM, assert_other_weights, assert_same_weights, data, model
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")

from gradclip_ext import patch_torch  # noqa: E402
from gradclip_ext.integrations.transformers import ClipGradients  # noqa: E402
from gradclip_ext.thresholds import ZClip  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.net(inputs), labels)}


def train(path: Path, callback: Any = None, **settings: Any) -> tuple[Module, Any]:
    module = Module()
    dataset = [{"inputs": x, "labels": y} for x, y in zip(*data(), strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(path), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1.0,
        lr_scheduler_type="constant", optim="sgd", report_to=[], use_cpu=True, logging_steps=1,
        disable_tqdm=True, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    callbacks = [] if callback is None else [callback]
    trainer = transformers.Trainer(module, arguments, train_dataset=dataset, callbacks=callbacks)
    trainer.train()
    return module, trainer


def test_the_group_may_be_a_function(expected: Module, tmp_path: Path) -> None:
    """FSDP1 wraps the model inside of train()."""
    module, _ = train(tmp_path, ClipGradients(MAX_NORM, group=lambda: ()), max_grad_norm=0.0)
    assert_same_weights(module, expected)


@pytest.fixture
def expected(tmp_path: Path) -> Module:
    module, _ = train(tmp_path, max_grad_norm=MAX_NORM)
    unclipped, _ = train(tmp_path, max_grad_norm=0.0)
    assert_other_weights(module, unclipped)
    return module


def test_the_patch_reaches_the_trainer(
    expected: Module, tmp_path: Path, counts: dict[tuple[str, str], int]
) -> None:
    with patch_torch():
        module, _ = train(tmp_path, max_grad_norm=MAX_NORM)
    assert_same_weights(module, expected)
    assert sum(counts.values()) >= 4


def test_the_callback_clips(expected: Module, tmp_path: Path) -> None:
    callback = ClipGradients(MAX_NORM)
    module, trainer = train(tmp_path, callback, max_grad_norm=0.0)
    assert_same_weights(module, expected)
    assert callback.total_norm is not None
    assert trainer.state.log_history[0]["grad_norm"] > MAX_NORM


def test_a_threshold_is_saved_with_checkpoints(tmp_path: Path) -> None:
    callback = ClipGradients(ZClip())
    train(tmp_path, callback, max_grad_norm=0.0, save_strategy="steps", save_steps=4)
    restored = ClipGradients(ZClip())
    restored.load(tmp_path / "checkpoint-4")
    saved, loaded = callback.max_norm.state_dict(), restored.max_norm.state_dict()
    assert saved and all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_scaled_gradients_are_unscaled_once() -> None:
    """The Trainer of version 5 has unscaled already, to log a norm; that of version 4 has not."""
    for first in (False, True):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(net(data()[0]).square().mean()).backward()
        if first:
            scaler.unscale_(optimizer)
        scaled = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).item()
        wrapped = type("Accelerated", (), {"scaler": scaler, "optimizer": optimizer})
        callback = ClipGradients(1e-3)
        callback.on_pre_optimizer_step(None, None, None, model=net, optimizer=wrapped)
        assert callback.total_norm is not None
        assert callback.total_norm.item() == pytest.approx(scaled / (1.0 if first else 1024.0), rel=1e-5)
        clipped = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
        assert clipped.item() == pytest.approx(1e-3, rel=2e-2)  # 1e-6 is added to the norm


def test_bad_settings_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_grad_norm=0\.0"):
        train(tmp_path, ClipGradients(1.0), max_grad_norm=1.0)
    arguments = type("Arguments", (), {"max_grad_norm": 0.0, "deepspeed": {"train_batch_size": 1}})
    with pytest.raises(NotImplementedError, match="DeepSpeed clips by itself"):
        ClipGradients(1.0).on_train_begin(arguments, None, None)
