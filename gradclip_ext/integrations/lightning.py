"""Lightning: a callback that clips, and a precision plugin for fused optimizers.

::

    from gradclip_ext.integrations.lightning import ClipGradients
    trainer = Trainer(callbacks=[ClipGradients(max_norm=1.0)])
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from gradclip_ext import clip_grad_norm_, clip_grad_value_, unscale_and_clip_grad_norm_
from gradclip_ext.amp import parameters_of
from gradclip_ext.arguments import as_float, as_limit
from gradclip_ext.integrations import DEEPSPEED_CLIPS_BY_ITSELF, group_of
from gradclip_ext.norms import Limit

if TYPE_CHECKING or find_spec("lightning") is not None:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import precision
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
else:  # the same code under its older name
    import pytorch_lightning as pl
    from pytorch_lightning.plugins import precision
    from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy


class ClipGradients(pl.Callback):  # type: ignore[misc]
    """Clips all gradients of an optimizer by norm before each of its steps, and logs the norm.

    In the place of ``Trainer(gradient_clip_val=...)``, with all that max_norm may be, and with fused
    optimizers under ``16-mixed``. The state of a threshold such as ``ZClip`` is kept in checkpoints.

    Args:
        max_norm: as in :func:`gradclip_ext.clip_grad_norm_`: a number, a tensor or a function.
        norm_type: order of the norm, as there.
        group: as there, or a function without arguments that returns it, which is called before each step.
            ``FSDPStrategy`` needs the ranks that share the shards (its process group).
        log: name under which the norm from before clipping is logged, None for no log.

    Raises:
        ValueError: the Trainer clips by itself (gradient_clip_val), or FSDPStrategy is used without group.
        NotImplementedError: DeepSpeedStrategy, whose engine clips by itself.

    Note:
        As :func:`gradclip_ext.clip_grad_norm_`; logging a norm does not wait for it.
    """

    def __init__(
        self, max_norm: Limit, norm_type: float = 2.0, *, group: Any = None, log: str | None = "grad_norm"
    ) -> None:
        as_limit(max_norm, allows_vector=False)
        self.max_norm = max_norm
        self.norm_type: float = as_float("norm_type", norm_type)
        self._group = group
        self._log = log

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.gradient_clip_val:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) would clip once more, after "
                "ClipGradients: leave one of the two out"
            )
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise NotImplementedError(DEEPSPEED_CLIPS_BY_ITSELF)
        if isinstance(trainer.strategy, FSDPStrategy) and self._group is None:
            raise ValueError(
                "FSDPStrategy shards plain tensors, whose norm is a part of the model's on each rank: pass "
                "group=lambda: torch.distributed.group.WORLD, or the process group of the shards, to "
                "ClipGradients (ModelParallelStrategy needs none)"
            )
        if isinstance(self.max_norm, torch.nn.Module):
            self.max_norm.to(pl_module.device)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        group = group_of(self._group)
        if scaler is not None and _is_still_scaled(optimizer):
            norm = unscale_and_clip_grad_norm_(scaler, optimizer, self.max_norm, self.norm_type, group=group)
        else:
            norm = clip_grad_norm_(parameters_of(optimizer), self.max_norm, self.norm_type, group=group)
        if self._log is not None:
            pl_module.log(self._log, norm)

    def state_dict(self) -> dict[str, Any]:
        return self.max_norm.state_dict() if isinstance(self.max_norm, torch.nn.Module) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if isinstance(self.max_norm, torch.nn.Module):
            self.max_norm.load_state_dict(state_dict)


class MixedPrecision(precision.MixedPrecision):  # type: ignore[misc]
    """Lightning's plugin for automatic mixed precision, with gradient clipping for fused optimizers, too.

    Such an optimizer unscales inside of its step, so Lightning refuses to clip before it. Here gradients are
    unscaled and clipped together, in one pass, and the step divides by nothing::

        trainer = Trainer(plugins=MixedPrecision("16-mixed", "cuda"), gradient_clip_val=1.0)
    """

    def clip_gradients(
        self, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm"
    ) -> None:
        """Clip as the Trainer's gradient_clip_val and gradient_clip_algorithm ask."""
        if clip_val <= 0:
            return
        by_norm = gradient_clip_algorithm == "norm"
        is_scaled = self.scaler is not None and _is_still_scaled(optimizer)
        if is_scaled and by_norm:
            unscale_and_clip_grad_norm_(self.scaler, optimizer, clip_val)
            return
        if is_scaled:
            self.scaler.unscale_(optimizer)
        if by_norm:
            clip_grad_norm_(parameters_of(optimizer), clip_val)
        else:
            clip_grad_value_(parameters_of(optimizer), clip_val)


def _is_still_scaled(optimizer: Any) -> bool:
    """Tell whether Lightning leaves the unscaling to the optimizer's step, as with fused ones."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
