"""accelerate: ``accelerator.clip_grad_norm_`` with all the arguments of this package.

::

    from gradclip_ext.integrations.accelerate import clip_grad_norm_
    if accelerator.sync_gradients:
        clip_grad_norm_(accelerator, model.parameters(), max_norm=1.0)

For code that calls ``accelerator.clip_grad_norm_``, ``gradclip_ext.patch_torch()`` does.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator, DistributedType
from torch import Tensor

import gradclip_ext
from gradclip_ext.clip import Tensors
from gradclip_ext.norms import Limit

_CLIP_BY_THEMSELVES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


def clip_grad_norm_(
    accelerator: Accelerator, parameters: Tensors, max_norm: Limit, norm_type: float = 2.0, **options: Any
) -> Tensor:
    """Unscale the gradients of all optimizers if a GradScaler has scaled them, then clip them by norm.

    Args:
        accelerator: the Accelerator that prepared model and optimizer.
        parameters: as in :func:`gradclip_ext.clip_grad_norm_`, like all that follows.
        max_norm: a number, a tensor or a function.
        norm_type: order of the norm.
        options: its other arguments, such as per_tensor or group.

    Returns:
        The norm before clipping, over all ranks.

    Raises:
        ValueError: FSDP1 without group, whose shards are plain tensors.
        NotImplementedError: DeepSpeed, Megatron-LM or XLA, which clip by code of their own.
    """
    kind = accelerator.distributed_type
    if kind in _CLIP_BY_THEMSELVES:
        raise NotImplementedError(
            f"under {kind} gradients are clipped by code of its own: call accelerator.clip_grad_norm_"
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2 and options.get("group") is None:
        raise ValueError(
            "FSDP1 shards plain tensors, whose norm is a part of the model's on each rank: pass "
            "group=model.process_group, or use FSDP2"
        )
    accelerator.unscale_gradients()
    return gradclip_ext.clip_grad_norm_(parameters, max_norm, norm_type, **options)
