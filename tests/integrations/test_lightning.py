"""Lightning: the Trainer's own clipping under the patch, the callback, the precision plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import MAX_NORM, assert_other_weights, assert_same_weights, data, model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from lightning.pytorch.plugins import precision  # noqa: E402

from gradclip_ext import patch_torch  # noqa: E402
from gradclip_ext.integrations.lightning import ClipGradients, MixedPrecision  # noqa: E402
from gradclip_ext.thresholds import ZClip  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.net = model()
        self._fused = fused

    def training_step(self, batch: Any, index: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs).float(), targets)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0, fused=self._fused)


def fit(module: Module, path: Path, checkpoint: Path | None = None, **settings: Any) -> Any:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=path, **{"enable_checkpointing": False, **settings},
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=4), ckpt_path=checkpoint)
    return trainer


@pytest.fixture
def expected(tmp_path: Path) -> Module:
    """The module as Lightning trains it with torch's functions."""
    module = Module()
    fit(module, tmp_path, gradient_clip_val=MAX_NORM)
    unclipped = Module()
    fit(unclipped, tmp_path)
    assert_other_weights(module, unclipped)
    return module


def test_the_patch_reaches_the_trainer(
    expected: Module, tmp_path: Path, counts: dict[tuple[str, str], int]
) -> None:
    module = Module()
    with patch_torch():
        fit(module, tmp_path, gradient_clip_val=MAX_NORM)
    assert_same_weights(module, expected)
    assert {function: n for (function, _), n in counts.items()} == {"clip_grad_norm_": 4}


def test_the_callback_clips_and_logs(expected: Module, tmp_path: Path) -> None:
    module = Module()
    trainer = fit(module, tmp_path, callbacks=[ClipGradients(MAX_NORM)])
    assert_same_weights(module, expected)
    assert trainer.logged_metrics["grad_norm"] > MAX_NORM


def test_the_group_may_be_a_function(expected: Module, tmp_path: Path) -> None:
    """Process groups exist only once the strategy has made them."""
    asked: list[str] = []

    def group() -> tuple[()]:
        asked.append("group")
        return ()

    module = Module()
    fit(module, tmp_path, callbacks=[ClipGradients(MAX_NORM, group=group)])
    assert_same_weights(module, expected)
    assert asked == 4 * ["group"]


def test_a_threshold_is_kept_in_checkpoints(tmp_path: Path) -> None:
    callback = ClipGradients(ZClip(), log=None)
    trainer = fit(Module(), tmp_path, callbacks=[callback])
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    restored = ClipGradients(ZClip())
    fit(Module(), tmp_path, checkpoint=tmp_path / "saved.ckpt", callbacks=[restored])
    saved, loaded = callback.max_norm.state_dict(), restored.max_norm.state_dict()
    assert saved and all(torch.equal(saved[name], loaded[name]) for name in saved)


def plugin(kind: type) -> Any:
    return kind("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_plugin_clips_before_fused_optimizers(tmp_path: Path, algorithm: str, fused: bool) -> None:
    settings = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    module, other = Module(fused), Module()
    fit(module, tmp_path, plugins=plugin(MixedPrecision), **settings)
    fit(other, tmp_path, plugins=plugin(precision.MixedPrecision), **settings)
    assert_same_weights(module, other, atol=1e-4)  # half precision inside of both
    assert_other_weights(module, Module())


def test_lightning_still_refuses_what_the_plugin_does(tmp_path: Path) -> None:
    """When this fails, Lightning clips before fused optimizers by itself, and the plugin can go."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Module(True), tmp_path, plugins=plugin(precision.MixedPrecision), gradient_clip_val=0.01)


@pytest.mark.parametrize("fused", [False, True])
def test_the_callback_clips_under_mixed_precision(tmp_path: Path, fused: bool) -> None:
    module, other = Module(fused), Module()
    fit(module, tmp_path, plugins=plugin(precision.MixedPrecision), callbacks=[ClipGradients(0.01)])
    fit(other, tmp_path, plugins=plugin(precision.MixedPrecision), gradient_clip_val=0.01)
    assert_same_weights(module, other, atol=1e-4)


def test_bad_settings_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave one of the two out"):
        fit(Module(), tmp_path, gradient_clip_val=1.0, callbacks=[ClipGradients(1.0)])
    with pytest.raises(ValueError, match="max_norm"):
        ClipGradients(-1.0)
    callback = ClipGradients(1.0)
    for name, error in (("DeepSpeedStrategy", NotImplementedError), ("FSDPStrategy", ValueError)):
        kind = getattr(pl.strategies, name)
        trainer = type("Trainer", (), {"gradient_clip_val": None, "strategy": object.__new__(kind)})
        with pytest.raises(error, match="ClipGradients"):
            callback.on_fit_start(trainer, Module())
