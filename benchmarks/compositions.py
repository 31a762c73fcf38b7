"""What one writes with torch's operations for what torch.nn.utils has no function for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


class Statistics(NamedTuple):
    """The attributes of gradclip_ext.GradStats."""

    total_norm: Tensor
    norms: Tensor
    absmax: Tensor
    zeros: Tensor
    nonfinite: Tensor


def get_grad_stats(parameters: Sequence[Parameter]) -> Statistics:
    """Return what gradclip_ext.get_grad_stats does, by the fewest passes that torch's operations allow."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms, absmax = (
        torch.stack(torch._foreach_norm(grads, order, dtype=torch.float32)) for order in (2.0, math.inf)
    )
    zeros = torch.stack([grad.numel() - torch.count_nonzero(grad) for grad in grads])
    nonfinite = torch.zeros_like(zeros)
    if not absmax.isfinite().all():
        nonfinite = torch.stack([grad.numel() - torch.isfinite(grad).sum() for grad in grads])
    return Statistics(torch.linalg.vector_norm(norms), norms, absmax, zeros, nonfinite)


def clip_each_(parameters: Sequence[Parameter], max_norm: float, foreach: bool | None = None) -> Tensor:
    """Clip each gradient by its own norm: one call of torch's function after the other."""
    clip = torch.nn.utils.clip_grad_norm_
    return torch.stack([clip(p, max_norm, foreach=foreach).float() for p in parameters])


def adaptive_clip_grad_(parameters: Sequence[Parameter], clip_factor: float, eps: float) -> None:
    """Clip each gradient beside its weight as timm.utils.agc does, tensor by tensor."""
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        limit = _unit_norms(parameter.detach()).clamp_(min=eps).mul_(clip_factor)
        norm = _unit_norms(grad)
        clipped = grad * (limit / norm.clamp(min=1e-6))
        grad.copy_(torch.where(norm < limit, grad, clipped))


def _unit_norms(tensor: Tensor) -> Tensor:
    dims = tuple(range(1, tensor.dim()))
    norms: Tensor = torch.linalg.vector_norm(tensor, 2.0, dims or None, keepdim=bool(dims))
    return norms
