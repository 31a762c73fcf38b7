"""The compiled backends, ``cuda`` and ``cpu``: one pass over memory per verb, for a whole list.

What the kernels do not take (gaps in memory, complex dtypes, orders p <= 0) goes to the foreach
backend, tensor by tensor, without holding the others back.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from gradclip_ext import _core
from gradclip_ext.backends.foreach import ForeachBackend

_OLDEST_CAPABILITY = (7, 0)  # for launches with more than 4 KB of parameters


class CompiledBackend:
    """The verbs on the tensors of one device type, by the kernels in csrc."""

    name: str

    def __init__(self) -> None:
        self._others = ForeachBackend()

    @property
    def _kernels(self) -> _core.Kernels:
        assert _core.C is not None
        kernels: _core.Kernels = getattr(_core.C, self.name)
        return kernels

    def norm(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        if not norm_type > 0:
            return self._others.norm(tensors, norm_type)
        norm, left = self._kernels.norm(list(tensors), norm_type)
        if not left:
            assert norm is not None  # the list has an element
            return norm
        other = self._others.norm([tensors[i] for i in left], norm_type).double()
        if norm is None or len(left) == len(tensors):
            return other
        return self.norm([torch.stack([norm, other])], norm_type)

    def scale_(self, grads: Sequence[Tensor], clip_coef: Tensor) -> None:
        left = self._kernels.scale_(list(grads), clip_coef)
        if left:
            self._others.scale_([grads[i] for i in left], clip_coef)

    def clamp_(self, grads: Sequence[Tensor], min: float, max: float) -> None:
        left = self._kernels.clamp_(list(grads), min, max)
        if left:
            self._others.clamp_([grads[i] for i in left], min, max)


class CpuBackend(CompiledBackend):
    """Tensors in CPU memory, by vectorised kernels on torch's threads (csrc/cpu)."""

    name = "cpu"

    def unusable(self, device: torch.device) -> str | None:
        if _core.C is None:
            return _core.REASON
        return None if device.type == "cpu" else "its kernels run on the CPU"


class CudaBackend(CompiledBackend):
    """Tensors on NVIDIA GPUs, by the kernels in csrc/cuda, on the current stream of their device.

    Nothing waits for the device. Scratch memory comes from torch's allocator and goes back to it
    when a call returns; a counter of 4 bytes per device and stream stays.
    """

    name = "cuda"

    def __init__(self) -> None:
        super().__init__()
        self._unfit: dict[int, str] = {}  # GPUs that the binary has no code for, each warned about once

    def unusable(self, device: torch.device) -> str | None:
        if _core.C is None:
            return _core.REASON
        if device.type != "cuda":
            return "its kernels run on NVIDIA GPUs"
        if _core.BUILT_FOR_CUDA is None:
            return (
                "the compiled module was built without CUDA (GRADCLIP_EXT_BUILD=cpu, torch without "
                "CUDA, or no fitting CUDA toolkit: see the log of pip install -v)"
            )
        built = f"built for CUDA {_core.BUILT_FOR_CUDA}, architectures {_core.ARCHITECTURES}"
        if not torch.cuda.is_available():
            return f"{built}; no CUDA device is visible"
        index = torch.cuda.current_device() if device.index is None else device.index
        obstacle = _core.C.cuda_obstacle(index)
        if obstacle is None:
            return None
        reason, lasts = obstacle
        if not lasts:
            return f"{built}; the kernels cannot be loaded now: {reason}"
        if index not in self._unfit:
            major, minor = torch.cuda.get_device_capability(index)
            remedy = f'reinstall with TORCH_CUDA_ARCH_LIST="{major}.{minor}"'
            if (major, minor) < _OLDEST_CAPABILITY:
                remedy = "the kernels need 7.0"
            self._unfit[index] = (
                f"{built}; this GPU has compute capability {major}.{minor} ({reason}): {remedy}"
            )
            warnings.warn(
                f"cuda:{index} gets slower backends: {self._unfit[index]}", RuntimeWarning, stacklevel=2
            )
        return self._unfit[index]
