"""Gradient clipping for PyTorch: by norm, by value, and inside backward.

The functions take the arguments of their ``torch.nn.utils`` namesakes; changing the
import is the whole migration. Importing this package patches nothing and starts no
CUDA context.
"""

import importlib
import types
import typing

from gradclip_ext._version import __version__
from gradclip_ext.adaptive import adaptive_clip_grad_
from gradclip_ext.amp import unscale_and_clip_grad_norm_
from gradclip_ext.clip import (
    clamp_grad_,
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    get_total_norm,
)
from gradclip_ext.hooks import ClampHandle, register_clamp_hook
from gradclip_ext.optimizer_hook import ClipHandle, register_clip_hook
from gradclip_ext.patch import TorchPatch, patch_torch, unpatch_torch
from gradclip_ext.skipping import skip_step_
from gradclip_ext.statistics import GradStats, get_grad_stats

if typing.TYPE_CHECKING:
    from gradclip_ext import distributed as distributed
    from gradclip_ext import info as info
    from gradclip_ext import integrations as integrations
    from gradclip_ext import thresholds as thresholds

__all__ = [
    "ClampHandle",
    "ClipHandle",
    "GradStats",
    "TorchPatch",
    "__version__",
    "adaptive_clip_grad_",
    "clamp_grad_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_grad_stats",
    "get_total_norm",
    "patch_torch",
    "register_clamp_hook",
    "register_clip_hook",
    "skip_step_",
    "unpatch_torch",
    "unscale_and_clip_grad_norm_",
]

# Imported when they are asked for, since importing takes time.
_MODULES = ("distributed", "info", "integrations", "thresholds")


def __getattr__(name: str) -> types.ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
