"""torchtitan: its clipping over FSDP, tensor, pipeline and expert parallelism, with one collective.

::

    from gradclip_ext.integrations import torchtitan
    torchtitan.patch()  # before the trainer runs
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchtitan.distributed import utils

import gradclip_ext
from gradclip_ext.clip import Tensors
from gradclip_ext.norms import Limit


def clip_grad_norm_(
    parameters: Tensors,
    max_norm: Limit,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    pp_mesh: DeviceMesh | None = None,
    ep_enabled: bool = False,
) -> Tensor:
    """Clip as ``torchtitan.distributed.utils.clip_grad_norm_`` does, with the same arguments.

    Args:
        parameters: the model parts' parameters, DTensors on any of torchtitan's meshes.
        max_norm: as in :func:`gradclip_ext.clip_grad_norm_`, also a tensor or a function.
        norm_type: order of the norm.
        error_if_nonfinite: raise, on all ranks, when the norm is NaN or infinite.
        foreach: as in :func:`gradclip_ext.clip_grad_norm_`.
        pp_mesh: the mesh of the pipeline, whose ranks hold other layers.
        ep_enabled: not needed: the meshes of the parameters say it.

    Returns:
        The norm before clipping, over all ranks, a plain 0-d tensor.
    """
    norm = gradclip_ext.clip_grad_norm_(
        parameters, max_norm, norm_type, error_if_nonfinite, foreach, group=pp_mesh
    )
    return norm.to_local() if isinstance(norm, DTensor) else norm


def patch() -> None:
    """Put :func:`clip_grad_norm_` in the place of torchtitan's, which its trainers look up when they clip.

    Returns nothing; :func:`unpatch` undoes it.
    """
    vars(utils).setdefault(_ORIGINAL, utils.clip_grad_norm_)
    utils.clip_grad_norm_ = clip_grad_norm_


def unpatch() -> None:
    """Put torchtitan's own function back."""
    original: Any = vars(utils).pop(_ORIGINAL, None)
    if original is not None:
        utils.clip_grad_norm_ = original


_ORIGINAL = "_clip_grad_norm_replaced_by_gradclip_ext"
