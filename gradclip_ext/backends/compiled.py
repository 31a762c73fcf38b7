"""The compiled backends, ``cpu`` and ``cuda``: the kernels in csrc, one pass over memory an operation."""

from __future__ import annotations

import math
import warnings
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip_ext import _extension
from gradclip_ext.backends.base import TensorList, current_stream, current_stream_handle, units_of
from gradclip_ext.norms import REPORT, AdaptiveRule, Coefficient, Rule, on_device
from gradclip_ext.segments import select

_OLDEST_CAPABILITY = (7, 0)  # for launches with more than 4 KB of parameters


class CpuBackend:
    """Tensors in CPU memory, by vectorised kernels on torch's threads (csrc/cpu)."""

    name = "cpu"

    def why_unavailable(self, device: torch.device) -> str | None:
        if _extension.C is None:
            return _extension.REASON
        return None if device.type == "cpu" else "its kernels run on the CPU"

    def norm(
        self, tensors: TensorList, norm_type: float, rule: Rule, dtype: torch.dtype
    ) -> tuple[Tensor, Coefficient]:
        max_norm = rule.max_norm if rule.is_plain else math.inf
        number, clip_coef = _extension.C.cpu_norm(
            tensors.native(), norm_type, max_norm, dtype is torch.float64
        )
        # half the time of torch.tensor()
        norm = torch.scalar_tensor(number, dtype=dtype, device=tensors.device)
        return norm, clip_coef if rule.is_plain else rule.clip_coef(norm)

    def scale_(self, tensors: TensorList, clip_coef: Coefficient, may_zero: bool = False) -> None:
        if isinstance(clip_coef, Tensor) and clip_coef.dim():
            coefs = clip_coef.to(torch.float64).contiguous()
            _extension.C.cpu_scale_each_(tensors.native(), coefs.data_ptr())
        else:
            _extension.C.cpu_scale_(tensors.native(), float(clip_coef))

    def clip_each_(self, tensors: TensorList, norm_type: float, rule: Rule, dtype: torch.dtype) -> Tensor:
        norms = torch.empty(len(tensors.tensors), dtype=torch.float64, device=tensors.device)
        limits = torch.as_tensor(rule.max_norm, dtype=torch.float64, device=tensors.device).contiguous()
        _extension.C.cpu_clip_each_(
            tensors.native(),
            norm_type,
            limits.data_ptr(),
            limits.dim(),  # the stride
            dtype is torch.float64,
            rule.zero_if_nonfinite,
            norms.data_ptr(),
        )
        return norms.to(dtype)

    def statistics(self, tensors: TensorList, norm_type: float) -> Tensor:
        packed = torch.empty(1 + 4 * len(tensors.tensors), dtype=torch.float64, device=tensors.device)
        _extension.C.cpu_statistics(tensors.native(), norm_type, packed.data_ptr())
        return packed

    def clip_adaptive_(self, grads: TensorList, weights: TensorList, rule: AdaptiveRule) -> None:
        units = [units_of(grad) for grad in grads.tensors if grad.numel() > 0]
        _extension.C.cpu_clip_adaptive_(grads.native(), weights.native(), units, *rule)

    def clamp_(self, tensors: TensorList, min: float, max: float) -> None:
        _extension.C.cpu_clamp_(tensors.native(), min, max)


class CudaBackend:
    """Tensors on NVIDIA GPUs, by the kernels in csrc/cuda, on the current stream of their device.

    Results and scratch memory come from torch's allocator; the scratch memory goes back to it, for later
    work on the same stream, when a call returns.
    """

    name = "cuda"

    def __init__(self) -> None:
        self._usable: set[torch.device] = set()
        self._unfit: dict[int, str] = {}  # GPUs that the binary has no code for, each warned about once

    def why_unavailable(self, device: torch.device) -> str | None:
        if device in self._usable:
            return None
        reason = self._find_reason(device)
        if reason is None:
            self._usable.add(device)
        return reason

    def _find_reason(self, device: torch.device) -> str | None:
        if _extension.C is None:
            return _extension.REASON
        if device.type != "cuda":
            return "its kernels run on NVIDIA GPUs"
        if not hasattr(_extension.C, "cuda_norm"):
            return f"the compiled module was built without CUDA: {_extension.CUDA_REASON}"
        if torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA"
        built = f"built with CUDA {_extension.BUILT_FOR_CUDA}, architectures {_extension.ARCHITECTURES}"
        if not torch.cuda.is_available():
            return f"{built}; no CUDA device is visible"
        index = torch.cuda.current_device() if device.index is None else device.index
        found: tuple[str, bool] | None = _extension.C.cuda_why_unavailable(index)
        if found is None:
            return None
        reason, is_permanent = found
        if not is_permanent:
            return f"{built}; the kernels cannot be loaded now: {reason}"
        if index not in self._unfit:
            self._unfit[index] = f"{built}; {_why_unfit(index, reason)}"
            warnings.warn(
                f"cuda:{index} gets slower backends: {self._unfit[index]}", RuntimeWarning, stacklevel=2
            )
        return self._unfit[index]

    def norm(
        self, tensors: TensorList, norm_type: float, rule: Rule, dtype: torch.dtype
    ) -> tuple[Tensor, Coefficient]:
        native, limit = tensors.native(), _limits(rule, tensors)
        norm = torch.empty((), dtype=dtype, device=tensors.device)
        clip_coef = torch.empty_like(norm)
        scratch = _scratch(_extension.C.cuda_norm_scratch_bytes(native), tensors)
        _extension.C.cuda_norm(
            native,
            norm_type,
            limit.arguments,
            dtype is torch.float64,
            norm.data_ptr(),
            clip_coef.data_ptr(),
            scratch.data_ptr(),
            *current_stream(tensors.device),
        )
        return norm, clip_coef

    def scale_(self, tensors: TensorList, clip_coef: Coefficient, may_zero: bool = False) -> None:
        if not isinstance(clip_coef, Tensor):
            clip_coef = torch.full((), clip_coef, dtype=torch.float64, device=tensors.device)
        self._enqueue_scale(tensors, _of_spans(clip_coef, tensors.native()))

    def clip_each_(self, tensors: TensorList, norm_type: float, rule: Rule, dtype: torch.dtype) -> Tensor:
        native = tensors.native()
        if not native.has_elements:
            return torch.zeros(len(tensors.tensors), dtype=dtype, device=tensors.device)
        norms = torch.empty(len(tensors.tensors) - len(native.empty), dtype=dtype, device=tensors.device)
        coefs = None if rule.is_plain and rule.max_norm == math.inf else torch.empty_like(norms)
        self._enqueue_tensors(tensors, norm_type, rule, norms, coefs, None)
        if coefs is not None:
            self._enqueue_scale(tensors, coefs)
        return _of_tensors(norms, native)

    def statistics(self, tensors: TensorList, norm_type: float) -> Tensor:
        native, size = tensors.native(), len(tensors.tensors)
        if not native.has_elements:
            return torch.zeros(1 + 4 * size, dtype=torch.float64, device=tensors.device)
        packed = torch.empty(1 + 4 * (size - len(native.empty)), dtype=torch.float64, device=tensors.device)
        self._enqueue_tensors(tensors, norm_type, REPORT, None, None, packed)
        if not native.empty:
            return packed
        return torch.cat([packed[:1], _of_tensors(packed[1:].view(4, -1), native).flatten()])

    def _enqueue_tensors(
        self,
        tensors: TensorList,
        norm_type: float,
        rule: Rule,
        norms: Tensor | None,
        coefs: Tensor | None,
        statistics: Tensor | None,
    ) -> None:
        """Compute what there is a tensor for, of the tensors that have elements."""
        native, limit = tensors.native(), _limits(rule, tensors)
        scratch = _scratch(_extension.C.cuda_tensors_scratch_bytes(native), tensors)
        _extension.C.cuda_tensors(
            native,
            norm_type,
            limit.arguments,
            norms is not None and norms.dtype is torch.float64,
            *(0 if t is None else t.data_ptr() for t in (norms, coefs, statistics)),
            scratch.data_ptr(),
            *current_stream(tensors.device),
        )

    def _enqueue_scale(self, tensors: TensorList, coefs: Tensor) -> None:
        """Scale by a 0-d tensor, or each tensor that has elements by its own number."""
        is_float64 = coefs.dtype is torch.float64
        stream = current_stream(tensors.device)
        _extension.C.cuda_scale_(tensors.native(), coefs.data_ptr(), is_float64, coefs.dim(), *stream)

    def clip_adaptive_(self, grads: TensorList, weights: TensorList, rule: AdaptiveRule) -> None:
        lists = grads.native(), weights.native(), [units_of(g) for g in grads.tensors if g.numel() > 0]
        if not lists[0].has_elements:
            return
        scratch = _scratch(_extension.C.cuda_adaptive_scratch_bytes(*lists), grads)
        _extension.C.cuda_clip_adaptive_(*lists, *rule, scratch.data_ptr(), *current_stream(grads.device))

    def clamp_(self, tensors: TensorList, min: float, max: float) -> None:
        _extension.C.cuda_clamp_(tensors.native(), min, max, current_stream_handle(tensors.device))


def _scratch(size: int, tensors: TensorList) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=tensors.device)


class _Limits(NamedTuple):
    """What the kernels compare norms with."""

    arguments: tuple[float, int, bool, int, bool]
    kept: Tensor | None  # whose memory the arguments point to, at least until the launch


def _limits(rule: Rule, tensors: TensorList) -> _Limits:
    """Return a rule's limits as the kernels take them, if no function makes them."""
    if isinstance(rule.max_norm, float):
        return _Limits((rule.max_norm, 0, False, 0, rule.zero_if_nonfinite), None)
    assert isinstance(rule.max_norm, Tensor)
    values = on_device(rule.max_norm, tensors.device)
    if values.dtype not in (torch.float32, torch.float64):
        values = values.to(torch.float64)
    values = _of_spans(values, tensors.native())
    is_float64 = values.dtype is torch.float64
    return _Limits((0.0, values.data_ptr(), is_float64, values.dim(), rule.zero_if_nonfinite), values)


# A kernel's vectors leave out the tensors without elements, where a list has some.


def _of_spans(values: Tensor, native: Any) -> Tensor:
    """Return the values of the tensors that have elements; a 0-d tensor as it is."""
    if values.dim() and native.empty:
        empty = set(native.empty)
        values = select(values, [i for i in range(len(values)) if i not in empty])
    return values.contiguous()


def _of_tensors(values: Tensor, native: Any) -> Tensor:
    """Return values of shape [..., n] for all n tensors, with 0 for those without elements."""
    if not native.empty:
        return values
    empty, indices = set(native.empty), count()
    tensors = values.shape[-1] + len(empty)
    return select(values, [None if i in empty else next(indices) for i in range(tensors)])


def _why_unfit(index: int, reason: str) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    remedy = f'reinstall with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
    if (major, minor) < _OLDEST_CAPABILITY:
        remedy = "the kernels need 7.0"
    elif "driver version" in reason:
        remedy = "update the NVIDIA driver, or build with an older CUDA toolkit"
    return f"this GPU has compute capability {major}.{minor} ({reason}): {remedy}"
