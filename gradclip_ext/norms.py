"""From the norms of parts to the coefficient: how they combine, what the threshold makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from gradclip_ext.interception import is_intercepted

# A number where the host knows it, otherwise a tensor on the device that computed the norm: 0-d, or with one
# element for each tensor. ZERO is no factor: it says that +0.0 takes the place of every element, because NaN
# and inf times 0 are NaN.
Coefficient = float | Tensor
ZERO = -1.0

# Up to this order float64 holds the power of any float32 number, and sums of 10^70 of them.
LARGEST_DIRECT_ORDER = 6.0

# The largest norm allowed: a number, a tensor whose value only its device knows, or a function of the norm.
Limit = float | Tensor | Callable[[Tensor], Any]


class Rule:
    """What a call makes of a norm.

    Args:
        max_norm: the threshold, 0 or more; inf means that the call only reports the norm. A tensor has one
            element, or one for each element of the norm; a function takes the norm and returns a number or
            such a tensor. What is negative there raises if the host can see it and else acts as 0; NaN acts
            as a NaN norm.
        error_if_nonfinite: a NaN or infinite norm is an error.
        zero_if_nonfinite: a NaN or infinite norm sets gradients to 0, whatever max_norm is.
    """

    def __init__(
        self, max_norm: Limit, error_if_nonfinite: bool = False, zero_if_nonfinite: bool = False
    ) -> None:
        if error_if_nonfinite and zero_if_nonfinite:
            raise ValueError(
                "error_if_nonfinite=True and zero_if_nonfinite=True exclude each other: a non-finite norm "
                "either raises or sets the gradients to 0, so pass one of them"
            )
        self.max_norm = max_norm
        self.error_if_nonfinite = error_if_nonfinite
        self.zero_if_nonfinite = zero_if_nonfinite
        #: Whether the kernels that compute a norm know how to compute the coefficient, too.
        self.is_plain: bool = isinstance(max_norm, float) and not zero_if_nonfinite

    def clip_coef(self, total_norm: Tensor) -> Coefficient:
        """Return min(1, max_norm / (total_norm + 1e-6)) where the norm is, in float32 or float64.

        csrc/core/rule.h is the same in C++, for plain rules.
        """
        norm = total_norm if total_norm.dtype in (torch.float32, torch.float64) else total_norm.float()
        max_norm = self.max_norm
        if not isinstance(max_norm, (float, Tensor)):
            max_norm = _limit_from(max_norm, norm)
        if not isinstance(max_norm, Tensor):
            if max_norm == math.inf and not self.zero_if_nonfinite:
                return 1.0  # only reports: even a NaN norm must not scale by NaN
            coef = torch.ones_like(norm) if max_norm == math.inf else _times_reciprocal(norm, max_norm)
        else:
            max_norm = on_device(max_norm, norm.device)
            scaling = _times_reciprocal(norm, max_norm.clamp(min=0.0).to(norm.dtype))
            coef = torch.where(max_norm == math.inf, 1.0, scaling)
        if self.zero_if_nonfinite:
            coef = torch.where(torch.isfinite(norm) & ~coef.isnan(), coef, ZERO)
        return coef

    def raise_if_nan(self, clip_coef: Coefficient) -> None:
        """Raise where the norm is finite and max_norm is NaN, which only the device could tell before.

        Waits for the device, as :func:`raise_if_nonfinite` does.
        """
        if self.error_if_nonfinite and isinstance(clip_coef, Tensor) and clip_coef.isnan().any():
            raise RuntimeError(
                "max_norm is NaN, so the gradients cannot be clipped. To set them to NaN anyway, pass "
                "`error_if_nonfinite=False`"
            )

    def as_torch_takes_it(self, total_norm: Tensor | None = None) -> float:
        """Return max_norm, or raise if torch's own functions cannot do what was asked for."""
        asked = [
            name
            for name, is_asked in (
                ("max_norm as a tensor or function", not isinstance(self.max_norm, float)),
                ("zero_if_nonfinite=True", self.zero_if_nonfinite),
                ("total_norm of several elements", total_norm is not None and total_norm.dim() != 0),
            )
            if is_asked
        ]
        if asked:
            raise NotImplementedError(
                f"{' and '.join(asked)}: not supported for a list with a tensor subclass that goes to "
                "torch's own function (FakeTensor, or DTensors under torch.compile or of an unusual "
                "placement). Pass a number, or clip outside of the compiled function"
            )
        assert isinstance(self.max_norm, float)
        return self.max_norm


def _times_reciprocal(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    # torch's order, reciprocal then product: a true division differs by an ulp for many norms
    return torch.clamp((norm + 1e-6).reciprocal() * max_norm, max=1.0)


def _limit_from(function: Callable[[Tensor], Any], norm: Tensor) -> float | Tensor:
    """Return what a caller's function makes of a norm, which is all that anybody knows about it: its value
    may be NaN where the norm is."""
    limit = function(norm.clone())  # the function may keep or change what it gets
    if isinstance(limit, bool) or (isinstance(limit, Tensor) and limit.dtype is torch.bool):
        raise TypeError(
            f"max_norm returned a bool for {_norms_of(norm)}: return the largest allowed norm (a condition, "
            "as SpikeDetector's, is for skip_step_)"
        )
    if isinstance(limit, Tensor):
        if limit.is_complex():
            raise TypeError(f"max_norm returned a tensor of {limit.dtype}: return a real one")
        limit = as_floating(whole(limit).detach())
        if limit.numel() == 1:
            limit = limit.reshape(())
        elif limit.shape != norm.shape:
            shapes = f"one element or shape {tuple(norm.shape)}" if norm.dim() else "one element"
            raise ValueError(
                f"max_norm returned a tensor of shape {tuple(limit.shape)} for {_norms_of(norm)}: return a "
                f"number, or a tensor with {shapes}"
            )
        if limit.is_cpu and not is_intercepted() and (limit < 0.0).any():
            _raise_negative(limit.amin().item(), norm)
        return limit
    try:
        number = float(limit)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"max_norm returned {limit!r} of type {type(limit).__name__} for {_norms_of(norm)}: return a "
            "number or a tensor"
        ) from error
    if not is_intercepted() and number < 0.0:
        _raise_negative(number, norm)
    return max(number, 0.0)  # NaN, if it comes first


def _raise_negative(limit: float, norm: Tensor) -> NoReturn:
    raise ValueError(
        f"max_norm returned {limit} for {_norms_of(norm)}: return 0 or more, or inf to clip nothing"
    )


def _norms_of(norm: Tensor) -> str:
    return f"{norm.numel()} norms, one for each parameter" if norm.dim() else "one norm"


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor on a device; the host waits only for what leaves an accelerator."""
    if value.device == device:
        return value
    if value.is_cpu and value.dim() == 0 and not is_intercepted():
        # A copy from the CPU would wait for the device; a number that the host knows is filled in.
        return value.new_full((), value.item(), device=device)
    return value.to(device, non_blocking=value.is_cpu)


def as_floating(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else value.float()


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor as the plain tensor that all ranks see, which communicates unless it is replicated."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


REPORT = Rule(math.inf)


class AdaptiveRule(NamedTuple):
    """What adaptive clipping makes of the norm of a unit and that of its weight."""

    norm_type: float
    clip_factor: float
    eps: float

    def clip_coef(self, norm: Tensor, weight_norm: Tensor) -> Tensor:
        """Return limit / norm where the norm is not below the limit, clip_factor * max(weight_norm, eps), and
        1 elsewhere. AdaptiveRule in csrc/core/rule.h is the same."""
        limit = weight_norm.clamp(min=self.eps) * self.clip_factor
        return torch.where(norm < limit, 1.0, limit / norm.clamp(min=1e-6))


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
    if abs(norm_type) == math.inf:  # not isinf(), see arguments.py
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
    if torch.isfinite(norm).all():
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
