"""Clipping each gradient by its own norm: ``clip_grad_norm_(..., per_tensor=True)``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradclip_ext import calls
from gradclip_ext.backends import Selection
from gradclip_ext.gradients import holds_dtensor, read_gradients
from gradclip_ext.norms import Rule, raise_if_nonfinite
from gradclip_ext.segments import Segments


def clip_each_(
    parameters: list[Any],
    norm_type: float,
    rule: Rule,
    selection: Selection,
    group: Any = None,
    copies: Any = None,
) -> Tensor:
    """Scale each gradient so that its own norm is at most the limit; return the norms [T] from before.

    Where the limits are known beforehand and nothing is sharded, a backend may scale each tensor while it is
    in cache.
    """
    segments = Segments(parameters)
    segments.check_one_each("max_norm", rule.max_norm)
    if not norm_type > 0.0 and (group is not None or holds_dtensor(segments.parameters)):
        raise NotImplementedError(
            f"per_tensor=True with norm_type={norm_type}: not supported over ranks, pass one above 0"
        )
    gradients = read_gradients(
        segments.parameters, selection, norm_type=norm_type, group=group, copies=copies
    )
    calls.count("clip_grad_norm_", gradients, selection)
    if gradients is None:
        raise NotImplementedError(
            "per_tensor=True: not supported for tensors that dispatch by themselves (FakeTensor, or DTensors "
            "under torch.compile or of an unusual placement): clip by the joint norm instead"
        )
    if not gradients.tensors and not gradients.is_sharded:
        return torch.zeros(len(segments.parameters), dtype=torch.float32, device="cpu")
    count = len(gradients.tensors)
    is_known = isinstance(rule.max_norm, (float, Tensor)) and not rule.error_if_nonfinite
    if is_known and not gradients.is_sharded:
        if isinstance(rule.max_norm, Tensor) and rule.max_norm.dim():
            limits = segments.of_gradients(rule.max_norm, count)
            rule = Rule(limits, zero_if_nonfinite=rule.zero_if_nonfinite)
        return segments.of_parameters(gradients.clip_each_(norm_type, rule))
    norms = segments.of_parameters(gradients.norms(norm_type))
    clip_coef = rule.clip_coef(norms)
    if rule.error_if_nonfinite:
        grads = (None if p.grad is None else gradients.on_this_rank(p.grad) for p in parameters)
        raise_if_nonfinite(norms, norm_type, grads, gradients.is_sharded)
        rule.raise_if_nan(clip_coef)
    if isinstance(clip_coef, Tensor) and clip_coef.dim():
        clip_coef = segments.of_gradients(clip_coef, count)
    gradients.scale_(clip_coef, rule.zero_if_nonfinite)
    return norms
