"""The backend made of torch operations alone. It runs anywhere and is always there.

Two strategies. On the CPU the host sees every value, so it cuts the list into pieces that
suit the cache, repairs sums that left the range, and skips the write when nothing needs
clipping. Everywhere else, and under a tracer or transform, nothing may depend on a value:
the list goes to ``torch._foreach_*`` with float64 results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._foreach_utils import _device_has_foreach_support

from gradclip_ext.backends import foreach_adaptive, foreach_cpu
from gradclip_ext.backends.base import TensorList, flat_view, share_memory
from gradclip_ext.backends.foreach_cpu import SMALL, portions
from gradclip_ext.interception import is_intercepted
from gradclip_ext.norms import AdaptiveRule, Coefficient, Rule, combine_norms, widest_dtype

# On an accelerator: the largest tensor of a half type that is converted to be scaled, and how many elements
# are converted at a time. Their 32 MB of float32 stay in the L2 of an H100.
_SMALL_HALF = 1 << 20
_CONVERTED_HALVES = 1 << 23


def has_foreach_kernels(device_type: str) -> bool:
    """Tell whether torch counts this device type among those of its foreach functions."""
    return _device_has_foreach_support(torch.device(device_type))


class ForeachBackend:
    """torch operations on any device.

    Args:
        batched: False handles one tensor after the other, for callers who pass foreach=False.
    """

    name = "foreach"

    def __init__(self, batched: bool = True) -> None:
        self._batched = batched

    def why_unavailable(self, device: torch.device) -> str | None:
        return None

    def norm(
        self, tensors: TensorList, norm_type: float, rule: Rule, dtype: torch.dtype
    ) -> tuple[Tensor, Coefficient]:
        if foreach_cpu.host_sees(tensors.tensors[0]):
            norm = foreach_cpu.joint_norm(tensors.tensors, norm_type, SMALL if self._batched else 0)
        else:
            with_elements = [t for t in tensors.tensors if t.numel() > 0]
            norm = _device_norm(with_elements, norm_type, self._batched)
        norm = norm.to(dtype)
        return norm, rule.clip_coef(norm)

    def scale_(self, tensors: TensorList, clip_coef: Coefficient, may_zero: bool = False) -> None:
        if not isinstance(clip_coef, Tensor):
            if clip_coef >= 1.0:
                return
            clip_coef = torch.tensor(clip_coef, dtype=widest_dtype(tensors.device), device=tensors.device)
        scaled = tensors.tensors
        if torch.complex32 in tensors.dtypes:
            scaled = [_without_complex32(t) for t in scaled]
        if clip_coef.dim():
            for tensor, coef in zip(scaled, clip_coef.unbind()):
                _scale_([tensor], coef, may_zero)
        elif not (foreach_cpu.host_sees(clip_coef) and clip_coef.item() >= 1.0):
            for group in _batches(scaled, self._batched):
                _scale_(group, clip_coef, may_zero)

    def clip_each_(self, tensors: TensorList, norm_type: float, rule: Rule, dtype: torch.dtype) -> Tensor:
        norms = self._norms(tensors, norm_type).to(dtype)
        self.scale_(tensors, rule.clip_coef(norms), rule.zero_if_nonfinite)
        return norms

    def statistics(self, tensors: TensorList, norm_type: float) -> Tensor:
        listed, wide = tensors.tensors, widest_dtype(tensors.device)
        norms = self._norms(tensors, norm_type)
        with_elements = [norm for norm, t in zip(norms.unbind(), listed) if t.numel() > 0]
        total = combine_norms(with_elements, norm_type) if with_elements else norms.new_zeros(())
        largest = norms if norm_type == math.inf else self._norms(tensors, math.inf)
        if foreach_cpu.host_sees(largest):
            numels = torch.tensor([t.numel() for t in listed], device="cpu")
            zeros = numels - torch.stack([torch.count_nonzero(t) for t in listed])
            nonfinite = torch.zeros_like(zeros)
            if not largest.isfinite().all():
                nonfinite = numels - torch.stack([torch.isfinite(t).sum() for t in listed])
        else:  # the host would wait for a copy of the sizes
            zeros = torch.stack([t.numel() - torch.count_nonzero(t) for t in listed])
            nonfinite = torch.stack([t.numel() - torch.isfinite(t).sum() for t in listed])
        return torch.cat([total.reshape(1), norms, largest, zeros.to(wide), nonfinite.to(wide)])

    def _norms(self, tensors: TensorList, norm_type: float) -> Tensor:
        """Return the norm of each tensor in float64, 0 without elements."""
        if foreach_cpu.host_sees(tensors.tensors[0]):
            return foreach_cpu.norms(tensors.tensors, norm_type, SMALL if self._batched else 0)
        return torch.stack(_device_norms(tensors.tensors, norm_type, self._batched))

    def clip_adaptive_(self, grads: TensorList, weights: TensorList, rule: AdaptiveRule) -> None:
        small = SMALL if self._batched else 0
        foreach_adaptive.clip_adaptive_(grads.tensors, weights.tensors, rule, small)

    def clamp_(self, tensors: TensorList, min: float, max: float) -> None:
        for group in _batches(tensors.tensors, self._batched):
            if len(group) == 1:
                group[0].clamp_(min, max)
                continue
            # foreach has no clamp with two bounds: its two passes pay off where calls cost more than bytes,
            # which on the CPU means small tensors.
            most = SMALL if foreach_cpu.host_sees(group[0]) else math.inf
            together = [g for g in group if g.numel() <= most]
            if together:
                torch._foreach_clamp_min_(together, min)
                torch._foreach_clamp_max_(together, max)
            for grad in group if not together else [g for g in group if g.numel() > most]:
                grad.clamp_(min, max)


def _scale_(tensors: list[Tensor], clip_coef: Tensor, may_zero: bool) -> None:
    """Multiply by a 0-d coefficient. As a Python number it would be rounded to bfloat16 along with the
    gradient and cost four times the host time."""
    if foreach_cpu.host_sees(clip_coef) and not 0.0 <= (coef := clip_coef.item()) < 1.0:
        if coef >= 1.0:
            return
        if coef < 0.0:
            if len(tensors) > 1:
                torch._foreach_zero_(tensors)
            else:
                tensors[0].zero_()  # also a lazy conjugate or negative view, which foreach refuses
            return
    halves = [] if clip_coef.device.type == "cpu" else [t for t in tensors if _is_strided_half(t)]
    if halves:
        _scale_halves_(halves, clip_coef.to(torch.float32))
    wide = [t for t in tensors if not _is_strided_half(t)] if halves else tensors
    if len(wide) > 1:
        torch._foreach_mul_(wide, clip_coef)
    elif wide:
        wide[0].mul_(clip_coef)
    if may_zero and not foreach_cpu.host_sees(clip_coef):
        for tensor in tensors:  # the product may be NaN
            tensor.masked_fill_(clip_coef < 0.0, 0.0)


def _is_strided_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16) and tensor.layout is torch.strided


def _scale_halves_(tensors: list[Tensor], clip_coef: Tensor) -> None:
    """Multiply in float32. On an accelerator torch rounds a 0-d coefficient to the tensor's dtype first, an
    error of up to 0.2 % in bfloat16; a coefficient that has a dimension keeps its own dtype.

    That is a launch for each tensor, 5 us on an H200, so smaller ones are converted, multiplied and written
    back together, by a launch for about a hundred of them each time.
    """
    if len(tensors) > 1 and not torch.compiler.is_compiling():  # then they have no gaps: see _batches
        small = [view for t in tensors if t.numel() <= _SMALL_HALF and (view := flat_view(t)) is not None]
        for part, numel in portions(small, _CONVERTED_HALVES):
            memory = torch.empty(numel, dtype=torch.float32, device=clip_coef.device)
            converted = memory.split([t.numel() for t in part])
            torch._foreach_copy_(converted, part)
            memory.mul_(clip_coef)
            torch._foreach_copy_(part, converted)
        tensors = [t for t in tensors if t.numel() > _SMALL_HALF]
    if with_dims := [tensor for tensor in tensors if tensor.dim() > 0]:
        torch._foreach_mul_(with_dims, [clip_coef.reshape(1)] * len(with_dims))
    for tensor in (t for t in tensors if t.dim() == 0):
        tensor.copy_(tensor * clip_coef)


def _without_complex32(tensor: Tensor) -> Tensor:
    """Return a view as float16, for which torch multiplies in float32; for complex32 it would round the
    coefficient to float16."""
    if tensor.dtype is not torch.complex32 or tensor.layout is not torch.strided:
        return tensor
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


# ---------------------------------------------------------------- norms


def _device_norm(tensors: Sequence[Tensor], p: float, batched: bool) -> Tensor:
    # float64 results hold the square of any float32, so nothing overflows and no value decides what runs
    # next.
    wide = widest_dtype(tensors[0].device)
    wide_complex = torch.complex64 if wide == torch.float32 else torch.complex128
    norms = [torch.linalg.vector_norm(t, p, dtype=wide_complex) for t in tensors if t.is_complex()]
    real = [t for t in tensors if not t.is_complex()]
    for group in _batches(real, batched):
        if len(group) > 1:
            norms += torch._foreach_norm(group, p, dtype=wide)
        else:
            norms.append(torch.linalg.vector_norm(group[0], p, dtype=wide))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), p)
    return total


def _device_norms(tensors: Sequence[Tensor], p: float, batched: bool) -> list[Tensor]:
    """Return the norm of each tensor: of those of one dtype by one call, where torch has fused kernels."""
    wide = widest_dtype(tensors[0].device)
    wide_complex = torch.complex64 if wide == torch.float32 else torch.complex128
    norms: dict[int, Tensor] = {}
    together: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel() == 0:
            norms[index] = torch.zeros((), dtype=wide, device=tensor.device)
        elif tensor.is_complex() or not batched or is_intercepted() or flat_view(tensor) is None:
            dtype = wide_complex if tensor.is_complex() else wide
            norms[index] = torch.linalg.vector_norm(tensor, p, dtype=dtype)
        else:
            together.setdefault(tensor.dtype, []).append(index)
    for indices in together.values():
        norms.update(zip(indices, torch._foreach_norm([tensors[i] for i in indices], p, dtype=wide)))
    in_order = [norms[index] for index in range(len(tensors))]
    return [norm.ne(0.0).to(wide) for norm in in_order] if p == 0.0 else in_order


def _batches(tensors: Sequence[Tensor], batched: bool) -> list[list[Tensor]]:
    """Return the groups that one foreach call may take, so that no tensor slows the rest down.

    On the CPU and under torch.compile that is the whole list. An accelerator's fused kernels
    want one dtype and no gaps, and their launches run over all tensors at once, so tensors
    that share memory are handled one after the other; so are those that may have none, and
    torch.func.vmap knows no foreach.
    """
    if len(tensors) <= 1:
        return [[t] for t in tensors]
    if batched and (torch.compiler.is_compiling() or foreach_cpu.host_sees(tensors[0])):
        return [list(tensors)]
    if not batched or is_intercepted() or share_memory(tensors):
        return [[t] for t in tensors]
    groups: dict[torch.dtype, list[Tensor]] = {}
    alone: list[list[Tensor]] = []
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_complex() or flat_view(tensor) is None:
            alone.append([tensor])
        else:
            groups.setdefault(tensor.dtype, []).append(tensor)
    return [*groups.values(), *alone]
