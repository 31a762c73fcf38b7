"""Adaptive clipping by torch operations: the norm of each unit beside its weight's, and the product."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip_ext.backends import foreach_cpu
from gradclip_ext.norms import LARGEST_DIRECT_ORDER, AdaptiveRule, combine_norms, widest_dtype

# Elements that the CPU converts at a time. 4 MiB of float64 stay in cache and in memory that the process has;
# to convert 39 million at once takes ten times as long, for each new page costs a fault.
_CONVERTED = 1 << 19


def clip_adaptive_(
    grads: Sequence[Tensor], weights: Sequence[Tensor], rule: AdaptiveRule, small: int
) -> None:
    """Scale each unit of each gradient by the rule's coefficient.

    Args:
        grads: the gradients, of any kind.
        weights: one for each gradient, of its shape.
        rule: makes the coefficient.
        small: the number of elements up to which tensors of one shape are joined, on the CPU.
    """
    alike: dict[tuple[torch.Size, torch.dtype, torch.dtype], list[int]] = {}
    for index, grad in enumerate(grads):
        if 0 < grad.numel() <= small and foreach_cpu.host_sees(grad):
            alike.setdefault((grad.shape, grad.dtype, weights[index].dtype), []).append(index)
        elif grad.numel() > 0:
            _clip_(_by_unit(grad), _by_unit(weights[index]), rule)
    for (shape, *_), indices in alike.items():
        most = _CONVERTED // shape.numel()
        for start in range(0, len(indices), most):
            part = [grads[i] for i in indices[start : start + most]]
            joined = torch.cat([_by_unit(grad) for grad in part])
            beside = torch.cat([_by_unit(weights[i]) for i in indices[start : start + most]])
            if _clip_(joined, beside, rule):
                torch._foreach_copy_(part, joined.view(len(part), *shape).unbind())


def _by_unit(tensor: Tensor) -> Tensor:
    """Return a view with the units along dimension 0 of two or more: below two, a tensor is one unit."""
    return tensor if tensor.dim() > 1 else tensor.reshape(1, -1)


def _clip_(grad: Tensor, weight: Tensor, rule: AdaptiveRule) -> bool:
    """Scale the units of a gradient; return whether one had to be, or may have had to."""
    coefs = rule.clip_coef(_norms(grad, rule.norm_type), _norms(weight, rule.norm_type))
    sees = foreach_cpu.host_sees(coefs)
    if sees and (coefs == 1.0).all():
        return False
    if grad.dtype not in (torch.float64, torch.complex128):
        coefs = coefs.to(torch.float32)  # torch would multiply in float64, several times slower
    units = _units_at_a_time(grad)
    if not sees or grad.dtype == coefs.dtype:
        grad.mul_(coefs)
    elif units > 0:
        for part, coef in zip(grad.split(units), coefs.split(units)):
            part.mul_(coef)
    else:
        for unit, coef in zip(grad.unbind(), coefs.flatten().unbind()):
            unit.mul_(coef)  # a coefficient of no dimension keeps its precision on the CPU, and needs no copy
    return True


def _units_at_a_time(tensor: Tensor) -> int:
    """Return how many units the CPU converts at a time, 0 if one is more than that."""
    return _CONVERTED * tensor.shape[0] // tensor.numel()


def _norms(tensor: Tensor, p: float) -> Tensor:
    """Return the norm of each unit, in float64, with the dimensions of the tensor."""
    if tensor.numel() <= _CONVERTED or not foreach_cpu.host_sees(tensor):
        return _norms_at_once(tensor, p)
    if units := _units_at_a_time(tensor):
        return torch.cat([_norms_at_once(part, p) for part in tensor.split(units)])
    norms = []
    for unit in tensor.unbind():
        parts = unit.reshape(1, -1).split(_CONVERTED, dim=1)
        norms.append(combine_norms([_norms_at_once(part, p).reshape(()) for part in parts], p))
    return torch.stack(norms).view(-1, *[1] * (tensor.dim() - 1))


def _norms_at_once(tensor: Tensor, p: float) -> Tensor:
    dims = list(range(1, tensor.dim()))
    wide = widest_dtype(tensor.device)
    if tensor.is_complex():
        tensor = tensor.to(torch.complex64 if wide == torch.float32 else torch.complex128).abs()
    elif tensor.dtype == torch.float16 and tensor.device.type == "cpu":
        tensor = tensor.float()  # torch converts float16 to float64 six times slower
    holds_powers = tensor.dtype != torch.float64 and not abs(p) > LARGEST_DIRECT_ORDER
    if holds_powers or p == 0.0 or abs(p) == math.inf:
        norms: Tensor = torch.linalg.vector_norm(tensor, p, dims, keepdim=True, dtype=wide)
        return norms
    # Powers may leave the range; those of ratios to the dominant element do not.
    extreme = math.inf if p > 0.0 else -math.inf
    dominant = torch.linalg.vector_norm(tensor, extreme, dims, keepdim=True, dtype=wide)
    norm = dominant * torch.linalg.vector_norm(tensor / dominant, p, dims, keepdim=True)
    return torch.where((dominant > 0.0) & (dominant < math.inf), norm, dominant)
