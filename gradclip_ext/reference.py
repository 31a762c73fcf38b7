"""The oracle: clipping in float64, one tensor after the other, nothing clever.

Tests and documentation compare with these functions. They change nothing, copy everything
and return float64 (complex128), so they are slow and easy to believe.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


def total_norm(tensors: Iterable[Tensor], norm_type: float = 2.0) -> float:
    """Return the norm of all elements as one vector; order 0 counts tensors with a nonzero element."""
    magnitudes = [_wide(t).abs().reshape(-1) for t in tensors if t.numel() > 0]
    if not magnitudes:
        return 0.0
    if norm_type == 0:
        return float(sum(bool((m != 0).any()) for m in magnitudes))
    x = torch.cat(magnitudes)
    if math.isinf(norm_type):
        return (x.max() if norm_type > 0 else x.min()).item()
    pivot = x.max() if norm_type > 0 else x.min()
    if pivot == 0 or not math.isfinite(pivot):
        return pivot.item()
    # |x|_p = m |x/m|_p: no power of a ratio to the dominant element leaves the range
    return (pivot * (x / pivot).pow(norm_type).sum().pow(1 / norm_type)).item()


def norms(tensors: Iterable[Tensor], norm_type: float = 2.0) -> list[float]:
    """Return the norm of each tensor, 0 without elements; order 0 is 1 where an element is nonzero."""
    return [total_norm([tensor], norm_type) for tensor in tensors]


class Statistics(NamedTuple):
    norm: float
    absmax: float
    zeros: int
    nonfinite: int


def statistics(tensors: Iterable[Tensor], norm_type: float = 2.0) -> list[Statistics]:
    """Return for each tensor its norm, largest magnitude, and numbers of zeros and of non-finite elements."""
    return [
        Statistics(
            total_norm([tensor], norm_type),
            total_norm([tensor], math.inf),
            int((_wide(tensor) == 0).sum()),
            int((~torch.isfinite(_wide(tensor))).sum()),
        )
        for tensor in tensors
    ]


def clip_coef(max_norm: float, norm: float) -> float:
    """Return min(1, max_norm / (norm + 1e-6)); NaN stays NaN, and max_norm = inf means 1."""
    if math.isinf(max_norm):
        return 1.0
    coef = max_norm / (norm + 1e-6)
    return 1.0 if coef > 1.0 else coef


def scale(tensors: Iterable[Tensor], coef: float) -> list[Tensor]:
    """Return every tensor times ``coef``."""
    return [_wide(t) * coef for t in tensors]


def clamp(tensors: Iterable[Tensor], min: float, max: float) -> list[Tensor]:
    """Return every tensor clamped to [min, max]."""
    return [_wide(t).clamp(min, max) for t in tensors]


def adaptive_clip(
    grads: Iterable[Tensor],
    weights: Iterable[Tensor],
    clip_factor: float,
    eps: float,
    norm_type: float = 2.0,
) -> list[Tensor]:
    """Return every gradient with its slices along dimension 0 clipped beside those of its weight."""
    clipped = []
    for grad, weight in zip(grads, weights):
        result = _wide(grad).clone()
        units = zip(result, weight) if grad.dim() > 1 else [(result, weight)]
        for unit, weight_unit in units:
            limit = clip_factor * max(total_norm([weight_unit], norm_type), eps)
            norm = total_norm([unit], norm_type)
            if not norm < limit:
                unit.mul_(limit / max(norm, 1e-6))
        clipped.append(result)
    return clipped


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)
