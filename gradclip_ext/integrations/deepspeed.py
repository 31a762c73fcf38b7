"""DeepSpeed ZeRO stages 1 and 2: the norm of its gradients in one pass, and the scaling in one.

::

    from gradclip_ext.integrations import deepspeed as fused_clipping
    engine, *_ = deepspeed.initialize(model=model, config={"gradient_clipping": 1.0, ...})
    fused_clipping.fuse(engine)

DeepSpeed takes the norm of one gradient after the other, each converted to float32 first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.utils import (
    is_model_parallel_parameter,
    mask_nan_or_inf_with_val_inplace,
)
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from gradclip_ext.backends import Selection
from gradclip_ext.gradients import read_only, read_written
from gradclip_ext.interception import is_intercepted
from gradclip_ext.norms import REPORT, on_device, widest_dtype


def fuse(engine: Any) -> None:
    """Let an engine's optimizer take norms and scale with the kernels of this package.

    Settings, results and collectives stay DeepSpeed's: gradient_clipping, loss scales, skipped steps,
    ``engine.get_global_grad_norm()``. The norm is added up in float64.

    Args:
        engine: what ``deepspeed.initialize`` returned, with ZeRO stage 1 or 2.

    Raises:
        TypeError: the engine's optimizer is another one (stage 0 or 3, for instance).
        RuntimeError: this release of DeepSpeed does not have the methods that would be replaced.
    """
    optimizer = getattr(engine, "optimizer", None)
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        raise TypeError(
            f"the engine's optimizer is a {type(optimizer).__name__}, not the DeepSpeedZeroOptimizer of ZeRO "
            "stages 1 and 2: set zero_optimization.stage to one of these, or go without fuse()"
        )
    for name, method in _METHODS.items():
        if not callable(getattr(optimizer, name, None)):
            raise RuntimeError(f"this release of DeepSpeed has no {name} to replace: go without fuse()")
        setattr(optimizer, name, MethodType(method, optimizer))


@torch.no_grad()
def _get_grad_norm_direct(
    self: Any, gradients: Iterable[Tensor], params: Iterable[Tensor], norm_type: float = 2
) -> Tensor:
    """Return the norm over all ranks, or -1 where it is infinite or NaN, as the method it replaces."""
    order = float(norm_type)
    owned = [g for g in gradients if not getattr(g, "_zero_padding", False)]
    if order != math.inf:
        owned = [g for g, p in zip(owned, params) if _counts(self, p)]
    if owned:
        given = read_only(owned, Selection(None, None, is_intercepted()))
        local, _ = given.norm(order, REPORT, widest_dtype(owned[0].device))
    else:
        local = torch.zeros((), dtype=torch.float64, device="cpu")
    local = on_device(local, torch.device(self.device))
    if order == math.inf:
        # The maximum of floats loses NaN in gloo and NCCL: infinity says as much, that the step is skipped.
        total = torch.where(local.isnan(), math.inf, local)
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self.dp_process_group)
        self._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.MAX)
    else:
        total = local.pow(order)
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self.dp_process_group)
        self._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
        total = total.pow(1.0 / order)
    total = total.to(torch.float32)
    mask_nan_or_inf_with_val_inplace(total, device=self.device)
    return total


def _counts(optimizer: Any, parameter: Tensor) -> bool:
    """Tell whether this rank adds a parameter's gradient: another one may hold the same."""
    if getattr(parameter, PIPE_REPLICATED, False):
        return False
    return bool(is_model_parallel_parameter(parameter)) or optimizer.model_parallel_rank == 0


@torch.no_grad()
def _unscale_and_clip_grads(self: Any, grad_groups_flat: Iterable[Any], total_norm: Any) -> None:
    """Divide by the loss scale and clip, in one pass; nothing is written where that changes nothing."""
    if self.clip_grad == 0.0 and self.loss_scale == 1.0:
        return
    grads = [g for group in grad_groups_flat for g in (group if isinstance(group, list) else [group])]
    factor = torch.as_tensor(1.0 / self.loss_scale, dtype=torch.float32)
    if self.clip_grad > 0.0:
        norm = on_device(torch.as_tensor(total_norm, dtype=torch.float32), grads[0].device)
        # A norm of -1 stands for infinity. step() does not get here with one, other callers may.
        norm = torch.where(norm < 0.0, math.inf, norm) / self.loss_scale
        factor = factor * (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)
    given = read_written(grads, Selection(None, None, is_intercepted()))
    # A factor from 1 on is 1, but where the loss scale is below it.
    (given.scale_ if self.loss_scale >= 1.0 else given.multiply_)(factor)


_METHODS: dict[str, Callable[..., Any]] = {
    "get_grad_norm_direct": _get_grad_norm_direct,
    "unscale_and_clip_grads": _unscale_and_clip_grads,
}
