"""Backends: the same three verbs on a list of tensors, and the choice among them.

``foreach`` is torch operations only: it runs wherever torch does and documents what every
other backend has to do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gradclip_ext.backends import foreach as _foreach

ENVIRONMENT_VARIABLE = "GRADCLIP_EXT_BACKEND"


class Backend(Protocol):
    """What a backend can do. Every list lives on one device and holds plain, checked tensors."""

    name: str

    def unusable(self, device_type: str) -> str | None:
        """Return why tensors of this device type cannot be served here, or None if they can."""

    def norm(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        """Return the norm of the list as one vector: a new 0-d tensor on its device, float64
        where the device has it."""

    def scale_(self, grads: Sequence[Tensor], clip_coef: Tensor) -> None:
        """Multiply by the 0-d coefficient, in float32 arithmetic or wider; write nothing where
        the host knows it to be 1 or more. Version counters are bumped either way."""

    def clamp_(self, grads: Sequence[Tensor], min: float, max: float) -> None:
        """Clamp to [min, max]; NaN stays NaN."""


ALL: dict[str, Backend] = {"foreach": _foreach.ForeachBackend()}
_LOOP = _foreach.ForeachBackend(batched=False)


def choose(name: str | None, foreach: bool | None, tensors: Sequence[Tensor]) -> Backend:
    """Return the backend for these tensors, or raise with the reason why the named one cannot serve.

    Args:
        name: the ``backend=`` argument. None defers to the environment variable
            GRADCLIP_EXT_BACKEND, and that to the first usable backend.
        foreach: the ``foreach=`` argument; False means one tensor at a time, which only
            the foreach backend does.
        tensors: the tensors to be served.
    """
    if name is not None and name not in ALL:
        raise ValueError(f"backend={name!r} does not exist; there are: {', '.join(ALL)}")
    devices = {t.device.type for t in tensors}
    if foreach is False:
        if name not in (None, "foreach"):
            raise ValueError(
                f"foreach=False asks for a loop over the tensors, which backend={name!r} does not "
                "have: drop one of the two arguments"
            )
        return _LOOP
    if foreach:
        for device_type in devices:
            if not _foreach.has_foreach_kernels(device_type):
                raise RuntimeError(
                    f"foreach=True was passed, but can't use the foreach API on {device_type} tensors"
                )
    return ALL["foreach"]
