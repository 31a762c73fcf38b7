"""From the norms of parts to the coefficient: how they combine, what the threshold makes of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

# A number where the host knows it, otherwise a 0-d tensor on the device that computed the norm.
Coefficient = float | Tensor


class Rule:
    """What a call makes of a norm.

    Args:
        max_norm: the threshold, 0 or more; inf means that the call only reports the norm.
        error_if_nonfinite: a NaN or infinite norm is an error.
    """

    def __init__(self, max_norm: float, error_if_nonfinite: bool = False) -> None:
        self.max_norm = max_norm
        self.error_if_nonfinite = error_if_nonfinite

    def clip_coef(self, total_norm: Tensor) -> Coefficient:
        """Return min(1, max_norm / (total_norm + 1e-6)) where the norm is, in float32 or float64.

        csrc/core/rule.h is the same in C++.
        """
        if self.max_norm == math.inf:  # only reports: even a NaN norm must not scale by NaN
            return 1.0
        norm = total_norm if total_norm.dtype in (torch.float32, torch.float64) else total_norm.float()
        # torch's order, reciprocal then product: a true division differs by an ulp for many norms
        return torch.clamp((norm + 1e-6).reciprocal() * self.max_norm, max=1.0)


REPORT = Rule(math.inf)


def result_dtype(dtypes: Collection[torch.dtype]) -> torch.dtype:
    """Return the dtype of a norm that users get: float64 as soon as one gradient is, else float32."""
    return torch.float64 if torch.float64 in dtypes or torch.complex128 in dtypes else torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on a device without it (Apple's GPUs, Intel's Arc)."""
    if device.type == "mps":
        return torch.float32
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return torch.float32
    return torch.float64


def combine_norms(norms: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return the norm of a list from the norms of its parts, which are 0-d tensors of one device and dtype.

    Never leaves the range where the result does not: the norms are divided by the dominant one before they
    are raised to a power. Order 0 counts tensors, so the counts add up. NaN stays NaN.
    """
    stacked = torch.stack(list(norms))
    if norm_type == 0.0:
        return stacked.sum()
    dominant = stacked.amax() if norm_type > 0.0 else stacked.amin()
    if math.isinf(norm_type):
        return dominant
    total = dominant * torch.linalg.vector_norm(stacked / dominant, norm_type)
    return torch.where((dominant > 0.0) & (dominant < math.inf), total, dominant)


def raise_if_nonfinite(
    norm: Tensor, norm_type: float, tensors: Iterable[Tensor | None], is_sharded: bool = False
) -> None:
    """Raise torch's RuntimeError for a NaN or infinite norm, plus the place of the first such value.

    ``is_sharded``: the norm is one over many ranks, and the tensors are what lies on this rank.

    Waits for the device: the one synchronisation of the package, asked for by error_if_nonfinite=True.
    """
    if torch.isfinite(norm):
        return
    whose = "this rank's list" if is_sharded else "the list"
    where = "Every gradient is finite: the norm itself is beyond the largest float."
    if is_sharded:
        where = "This rank's gradients are finite: look for the value in the other ranks' messages."
    for index, tensor in enumerate(tensors):
        if tensor is not None and not _all_finite(tensor):
            where = (
                f"The first non-finite value is in tensor {index} of {whose}, shape {tuple(tensor.shape)}."
            )
            break
    raise RuntimeError(
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
        "so it cannot be clipped. To disable this error and scale the gradients by the "
        f"non-finite norm anyway, set `error_if_nonfinite=False`. {where}"
    )


def _all_finite(tensor: Tensor) -> bool:
    # The inf-norm is finite exactly when every element is, and needs no mask as large as the tensor.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.linalg.vector_norm(tensor, math.inf)))
