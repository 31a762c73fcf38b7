"""The compiled module, where there is one that fits.

A ``_C`` built for another torch may import and fail later, or die on an undefined symbol while
importing, so the versions are compared first.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor


class FusedCalls(Protocol):
    """Whole calls: each is served or, returning None or False, left as it was.

    Arguments are the public functions', checked but for the gradients. A call that raises has changed
    nothing, either.
    """

    def clip_grad_norm_(
        self, parameters: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool, /
    ) -> tuple[Tensor, bool] | None:
        """Return the norm and whether it was refused for not being finite, nothing having changed."""

    def get_total_norm(self, tensors: list[Tensor], norm_type: float, /) -> Tensor | None: ...

    def clip_grads_with_norm_(self, parameters: list[Tensor], max_norm: float, norm: Tensor, /) -> bool: ...

    def clamp_grad_(self, parameters: list[Tensor], min: float, max: float, /) -> bool: ...


class Kernels(FusedCalls, Protocol):
    """What csrc/bindings.cpp defines for a device.

    Besides whole calls: verbs, which do their work on what they take and return the indices of the
    tensors they left.
    """

    def norm(self, tensors: list[Tensor], norm_type: float, /) -> tuple[Tensor | None, list[int]]: ...

    def scale_(self, tensors: list[Tensor], coef: Tensor, /) -> list[int]: ...

    def clamp_(self, tensors: list[Tensor], min: float, max: float, /) -> list[int]: ...


class Gathered(Protocol):
    """What csrc/bindings.cpp has read of a list for kernels that are not its own."""

    device: torch.device

    def columns(self) -> bytes: ...

    def dtypes(self) -> list[int]: ...

    def bump_versions(self) -> None: ...


class Core(Protocol):
    """The module: its kernels by the devices they serve."""

    any_device: Kernels
    cpu: Kernels
    cuda: Kernels
    CPU_CAPABILITY: str
    _testing: Any

    def gather(
        self, listed: list[Tensor], parameters: bool, write: bool, cuda_only: bool, /
    ) -> Gathered | None: ...

    def environment(self, name: str, /) -> str | None: ...

    def cuda_obstacle(self, device_index: int, /) -> tuple[str, bool] | None: ...


def load() -> tuple[Core | None, str | None]:
    """Return ``gradclip_ext._C`` and None, or None and the reason why it is not used."""
    if _build_info is None:
        return None, "the compiled module was not built (see the log of pip install -v)"
    if torch.__version__ != _build_info.TORCH:
        reason = (
            f"the compiled module was built for torch {_build_info.TORCH}, this is torch "
            f"{torch.__version__}: reinstall with --no-build-isolation"
        )
    else:
        try:
            return cast(Core, importlib.import_module("gradclip_ext._C")), None
        except ImportError as error:
            reason = f"the compiled module cannot be imported: {error}"
    warnings.warn(f"gradclip_ext falls back on torch operations: {reason}", RuntimeWarning, stacklevel=2)
    return None, reason


def _find_build_info() -> ModuleType | None:
    """Return what setup.py wrote beside the module that it built."""
    try:
        return importlib.import_module("gradclip_ext._build_info")
    except ModuleNotFoundError:
        return None


_build_info = _find_build_info()
BUILT_FOR_CUDA: str | None = getattr(_build_info, "CUDA", None)
ARCHITECTURES: str | None = getattr(_build_info, "ARCHITECTURES", None)
C, REASON = load()
