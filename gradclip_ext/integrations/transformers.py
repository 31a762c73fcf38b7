"""transformers: a callback that clips in the place of the Trainer.

::

    from gradclip_ext.integrations.transformers import ClipGradients
    arguments = TrainingArguments(..., max_grad_norm=0.0)
    trainer = Trainer(model, arguments, ..., callbacks=[ClipGradients(max_norm=ZClip())])

With a number as max_norm, ``gradclip_ext.patch_torch()`` and ``max_grad_norm`` do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from gradclip_ext import clip_grad_norm_
from gradclip_ext.arguments import as_float, as_limit
from gradclip_ext.integrations import DEEPSPEED_CLIPS_BY_ITSELF, group_of
from gradclip_ext.norms import Limit

STATE_FILE = "gradclip_ext.pt"


class ClipGradients(TrainerCallback):  # type: ignore[misc]
    """Clips all gradients by norm before each step of the optimizer, with all that max_norm may be.

    Args:
        max_norm: as in :func:`gradclip_ext.clip_grad_norm_`: a number, a tensor or a function. The state of
            a threshold such as ``ZClip`` is saved with each checkpoint, and loaded by :meth:`load`.
        norm_type: order of the norm, as there.
        group: as there, or a function without arguments that returns it, which is called before each step.
            FSDP1 needs ``lambda: trainer.model_wrapped.process_group``.

    Attributes:
        total_norm: the norm before the last step, a 0-d tensor. The Trainer's logs get it as ``grad_norm``
            if they have none; the Trainer waits for the device then anyway.

    Raises:
        ValueError: max_grad_norm is not 0, so the Trainer would clip, too.
        NotImplementedError: DeepSpeed, whose engine clips by itself.
    """

    def __init__(self, max_norm: Limit, norm_type: float = 2.0, *, group: Any = None) -> None:
        as_limit(max_norm, allows_vector=False)
        self.max_norm = max_norm
        self.norm_type: float = as_float("norm_type", norm_type)
        self.total_norm: Tensor | None = None
        self._group = group

    def load(self, checkpoint: str | Path) -> None:
        """Load the threshold's state from a checkpoint's folder, before training goes on from it."""
        if isinstance(self.max_norm, torch.nn.Module):
            self.max_norm.load_state_dict(torch.load(Path(checkpoint) / STATE_FILE, weights_only=True))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.max_grad_norm:
            raise ValueError(
                f"the Trainer clips by itself with max_grad_norm={args.max_grad_norm}, before ClipGradients: "
                "pass max_grad_norm=0.0 to TrainingArguments"
            )
        if getattr(args, "deepspeed", None):
            raise NotImplementedError(DEEPSPEED_CLIPS_BY_ITSELF)
        if isinstance(self.max_norm, torch.nn.Module):
            self.max_norm.to(args.device)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None:
            _unscale_once(scaler, optimizer.optimizer)
        parameters, group = list(model.parameters()), group_of(self._group)
        self.total_norm = clip_grad_norm_(parameters, self.max_norm, self.norm_type, group=group)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.total_norm is not None and logs is not None and "loss" in logs:
            logs.setdefault("grad_norm", self.total_norm.item())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.max_norm, torch.nn.Module) and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.max_norm.state_dict(), folder / STATE_FILE)


def _unscale_once(scaler: Any, optimizer: Any) -> None:
    """Unscale, unless the Trainer has done so to log the norm, as from version 5 on."""
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):
            raise
