"""The compiled backends, ``cpu`` and ``cuda``: the kernels in csrc, one pass over memory an operation."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _extension
from gradclip_ext.backends.base import TensorList, units_of
from gradclip_ext.backends.foreach import ForeachBackend, SegmentsByForeach
from gradclip_ext.norms import REPORT, AdaptiveRule, Coefficient, Rule

# For what the CUDA kernels do not do.
_FOREACH = ForeachBackend()
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


class CudaBackend(SegmentsByForeach):
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
        if not rule.is_plain:
            norm, _ = self.norm(tensors, norm_type, REPORT, dtype)
            return norm, rule.clip_coef(norm)
        native = tensors.native()
        norm = torch.empty((), dtype=dtype, device=tensors.device)
        clip_coef = torch.empty((), dtype=dtype, device=tensors.device)
        scratch = torch.empty(
            _extension.C.cuda_norm_scratch_bytes(native), dtype=torch.uint8, device=tensors.device
        )
        stream = torch.cuda.current_stream(tensors.device)
        _extension.C.cuda_norm(
            native,
            norm_type,
            rule.max_norm,
            dtype is torch.float64,
            norm.data_ptr(),
            clip_coef.data_ptr(),
            scratch.data_ptr(),
            stream.cuda_stream,
            _is_pool_stream(stream),
        )
        return norm, clip_coef

    def scale_(self, tensors: TensorList, clip_coef: Coefficient, may_zero: bool = False) -> None:
        if may_zero or (isinstance(clip_coef, Tensor) and clip_coef.dim()):
            return _FOREACH.scale_(tensors, clip_coef, may_zero)
        if not isinstance(clip_coef, Tensor):
            clip_coef = torch.full((), clip_coef, dtype=torch.float64, device=tensors.device)
        stream = torch.cuda.current_stream(tensors.device).cuda_stream
        is_float64 = clip_coef.dtype is torch.float64
        _extension.C.cuda_scale_(tensors.native(), clip_coef.data_ptr(), is_float64, stream)

    def clamp_(self, tensors: TensorList, min: float, max: float) -> None:
        stream = torch.cuda.current_stream(tensors.device).cuda_stream
        _extension.C.cuda_clamp_(tensors.native(), min, max, stream)


def _is_pool_stream(stream: Any) -> bool:
    """Tell whether a stream is torch's own: the id of an external one is its handle, the default's are 0."""
    return bool(stream.stream_id == 0 or stream.stream_id != stream.cuda_stream)


def _why_unfit(index: int, reason: str) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    remedy = f'reinstall with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
    if (major, minor) < _OLDEST_CAPABILITY:
        remedy = "the kernels need 7.0"
    elif "driver version" in reason:
        remedy = "update the NVIDIA driver, or build with an older CUDA toolkit"
    return f"this GPU has compute capability {major}.{minor} ({reason}): {remedy}"
