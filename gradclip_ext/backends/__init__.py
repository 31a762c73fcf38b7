"""Backends: the same three verbs on a list of tensors, and the choice among them.

``foreach`` is torch operations only: it runs wherever torch does and documents what every
other backend has to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from gradclip_ext import _core
from gradclip_ext.backends.compiled import CpuBackend, CudaBackend
from gradclip_ext.backends.foreach import ForeachBackend, has_foreach_kernels
from gradclip_ext.backends.triton import TritonBackend
from gradclip_ext.backends.triton_fused import FusedTriton
from gradclip_ext.tracing import operations_are_followed


class Backend(Protocol):
    """What a backend can do. Every list lives on one device and holds plain, checked tensors.

    A backend may have ``clip_norm_(grads, max_norm, norm_type)`` besides, which does all of clipping
    by norm, or nothing and returns None: see :meth:`TritonBackend.clip_norm_`.
    """

    name: str

    def unusable(self, device: torch.device) -> str | None:
        """Return why tensors on this device cannot be served here, or None if they can."""

    def norm(self, tensors: Sequence[Tensor], norm_type: float) -> Tensor:
        """Return the norm of the list as one vector, a new 0-d tensor on its device, float64 where
        the device has that; 0 if there is no element."""

    def scale_(self, grads: Sequence[Tensor], clip_coef: Tensor) -> None:
        """Multiply by the 0-d coefficient, in float32 arithmetic or wider; write nothing where
        the host knows it to be 1 or more. Version counters are bumped either way."""

    def clamp_(self, grads: Sequence[Tensor], min: float, max: float) -> None:
        """Clamp to [min, max]; NaN stays NaN."""


# In order of preference: without a name, a device is served by the first one that is usable for it.
_TRITON = TritonBackend()
ALL: dict[str, Backend] = {
    "cuda": CudaBackend(),
    "triton": _TRITON,
    "cpu": CpuBackend(),
    "foreach": ForeachBackend(),
}
# For callers who name none: a backend that fails after all gives way instead of raising.
_AUTOMATIC_TRITON = TritonBackend(fallback=ALL["foreach"])
_AUTOMATIC: dict[str, Backend] = {**ALL, "triton": _AUTOMATIC_TRITON}
_LOOP = ForeachBackend(batched=False)

ENVIRONMENT_VARIABLE = "GRADCLIP_EXT_BACKEND"


def _first_usable(device: torch.device) -> Backend:
    return next(backend for backend in _AUTOMATIC.values() if backend.unusable(device) is None)


def _fused() -> dict[str | None, tuple[_core.FusedCalls, ...]]:
    """Return who may take whole calls, by the name that was asked for."""
    if _core.C is None:
        return {}
    triton = FusedTriton(_TRITON, lambda device: _TRITON.unusable(device) is None, cuda_only=False)
    automatic = FusedTriton(
        _AUTOMATIC_TRITON, lambda device: _first_usable(device) is _AUTOMATIC_TRITON, cuda_only=True
    )
    return {
        None: (_core.C.any_device, automatic),
        "cuda": (_core.C.cuda,),
        "triton": (triton,),
        "cpu": (_core.C.cpu,),
    }


_FUSED = _fused()
_environment = os.environ.get if _core.C is None else _core.C.environment


def fused(name: str | None, foreach: bool | None) -> tuple[_core.FusedCalls, ...]:
    """Return who may be handed a call with these arguments whole, in turn.

    They check every gradient themselves and either serve the call or leave everything as it was;
    then the next one may try, and at last the general path goes by :func:`choose`.
    """
    # Other ways of tracing run this code with fake tensors, which are declined.
    if foreach is False or is_dynamo_compiling() or not (name is None or isinstance(name, str)):
        return ()
    return _FUSED.get(_environment(ENVIRONMENT_VARIABLE) if name is None else name, ())


def choose(
    name: str | None, foreach: bool | None, devices: Iterable[torch.device]
) -> dict[torch.device, Backend]:
    """Return which backend serves each of these devices: foreach while a tracer or a mode looks on.

    Args:
        name: the ``backend=`` argument; None defers to GRADCLIP_EXT_BACKEND in the
            environment, and that, unset, to the order of preference.
        foreach: the ``foreach=`` argument. False means one tensor at a time, which only the
            foreach backend does, so it overrules the environment.
        devices: the devices of the tensors to be served.

    Raises:
        ValueError: there is no backend of that name, or it has no loop for foreach=False.
        RuntimeError: the named backend cannot serve a device, with the reason; foreach=True
            on a device without foreach support.
    """
    asked, source = name, "backend"
    if name is None:
        # Not by _environment, which torch.compile cannot trace.
        asked, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if asked is not None and asked not in tuple(ALL):
        raise ValueError(f"{source}={asked!r} does not exist; there are: {', '.join(ALL)}")
    if foreach is False and name not in (None, "foreach"):
        raise ValueError(
            f"foreach=False asks for a loop over the tensors, which backend={name!r} does not have: "
            "drop one of the two arguments"
        )
    serving: dict[torch.device, Backend] = {}
    for device in devices:
        if foreach and not has_foreach_kernels(device.type):
            raise RuntimeError(
                f"foreach=True was passed, but can't use the foreach API on {device.type} tensors"
            )
        if foreach is False:
            serving[device] = _LOOP
        elif operations_are_followed():  # kernels would escape; Inductor fuses by itself
            serving[device] = ALL["foreach"]
        elif asked is None:
            serving[device] = _first_usable(device)
        else:
            serving[device] = ALL[asked]
            reason = ALL[asked].unusable(device)
            if reason is not None:
                raise RuntimeError(f"{source}={asked!r} cannot serve {device.type} tensors: {reason}")
    return serving
