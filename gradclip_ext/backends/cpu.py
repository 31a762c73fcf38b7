"""The compiled CPU backend: vectorised kernels on torch's threads, one pass over memory per verb.

What the kernels do not take (gaps in memory, complex dtypes, orders p <= 0) goes to the foreach
backend, tensor by tensor, without holding the others back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip_ext import _core
from gradclip_ext.backends.foreach import ForeachBackend


class CpuBackend:
    """Tensors in CPU memory, by the kernels in csrc/cpu."""

    name = "cpu"

    def __init__(self) -> None:
        self._others = ForeachBackend()

    def unusable(self, device_type: str) -> str | None:
        if _core.C is None:
            return _core.REASON
        return None if device_type == "cpu" else "its kernels run on the CPU"

    def norm(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        assert _core.C is not None
        if not norm_type > 0:
            return self._others.norm(tensors, norm_type)
        norm, left = _core.C.norm(list(tensors), norm_type)
        if not left:
            return norm
        other = self._others.norm([tensors[i] for i in left], norm_type).double()
        return other if len(left) == len(tensors) else _joined(norm, other, norm_type)

    def scale_(self, grads: Sequence[Tensor], clip_coef: Tensor) -> None:
        assert _core.C is not None
        left = _core.C.scale_(list(grads), clip_coef.item())
        if left:
            self._others.scale_([grads[i] for i in left], clip_coef)

    def clamp_(self, grads: Sequence[Tensor], min: float, max: float) -> None:
        assert _core.C is not None
        left = _core.C.clamp_(list(grads), min, max)
        if left:
            self._others.clamp_([grads[i] for i in left], min, max)


def _joined(first: Tensor, second: Tensor, p: float) -> Tensor:
    """Return the norm of two float64 norms; divided by the larger one, no power overflows."""
    norms = torch.stack([first, second])
    pivot = norms.amax()
    if not 0.0 < pivot.item() < math.inf:
        return pivot
    joined: Tensor = pivot * torch.linalg.vector_norm(norms / pivot, p)
    return joined
