"""The backends, and which of them handles a device.

``foreach`` is torch operations only: it runs wherever torch does and documents what every other backend
has to do.
"""

from __future__ import annotations

import os

import torch

from gradclip_ext.backends.base import Backend
from gradclip_ext.backends.compiled import CpuBackend, CudaBackend
from gradclip_ext.backends.foreach import ForeachBackend, has_foreach_kernels
from gradclip_ext.backends.traced import TracedBackend
from gradclip_ext.backends.triton import TritonBackend
from gradclip_ext.interception import is_transformed

# In order of preference: unless one is named, the first that is available handles a device. "cpu" is first:
# a call on a small list then takes two microseconds less, because "cuda" and "triton" are not asked.
ALL: dict[str, Backend] = {
    "cpu": CpuBackend(),
    "cuda": CudaBackend(),
    "triton": TritonBackend(),
    "foreach": ForeachBackend(),
}
FOREACH = ALL["foreach"]
# Chosen automatically, Triton gives way to foreach when it cannot compile, instead of raising.
_AUTOMATIC: dict[str, Backend] = {**ALL, "triton": TritonBackend(fallback=FOREACH)}
_LOOP = ForeachBackend(batched=False)

ENVIRONMENT_VARIABLE = "GRADCLIP_EXT_BACKEND"


class Selection:
    """Which backend handles each device in one call.

    Args:
        name: the ``backend=`` argument; None defers to GRADCLIP_EXT_BACKEND in the environment and,
            without that, to the order of preference.
        foreach: the ``foreach=`` argument. False means one tensor at a time, which only the foreach
            backend does, so it overrules the environment.
        is_intercepted: a tracer or mode has to see every operation, so foreach handles everything. Under
            torch.compile, norms are operations that come back here when the compiled code runs.

    Raises:
        ValueError: there is no backend of that name, or it has no loop for foreach=False.
    """

    def __init__(self, name: str | None, foreach: bool | None, is_intercepted: bool) -> None:
        self._name, self._source = name, "backend"
        if name is None:
            self._name, self._source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
        self._foreach = foreach
        self.is_intercepted = is_intercepted
        if self._name is not None and self._name not in tuple(ALL):
            raise ValueError(f"{self._source}={self._name!r} does not exist; there are: {', '.join(ALL)}")
        if foreach is False and name not in (None, "foreach"):
            raise ValueError(
                f"foreach=False asks for a loop over the tensors, which backend={name!r} does not have: "
                "drop one of the two arguments"
            )

    @property
    def loops(self) -> bool:
        """Whether one tensor is handled at a time, as ``foreach=False`` asks."""
        return self._foreach is False

    def backend_for(self, device: torch.device) -> Backend:
        """Return the backend for the tensors on a device.

        Raises:
            RuntimeError: the named backend cannot handle the device, with the reason; foreach=True on a
                device without foreach support.
        """
        if self._foreach and not has_foreach_kernels(device.type):
            raise RuntimeError(
                f"foreach=True was passed, but can't use the foreach API on {device.type} tensors"
            )
        if self.is_intercepted and torch.compiler.is_dynamo_compiling() and not is_transformed():
            # The environment is asked again when the compiled code runs.
            named = None if self._source == ENVIRONMENT_VARIABLE else self._name
            return TracedBackend(named, self._foreach)
        if self.loops:
            return _LOOP
        if self.is_intercepted:
            return FOREACH
        if self._name is None:
            for backend in _AUTOMATIC.values():
                if backend.why_unavailable(device) is None:
                    return backend
            raise AssertionError("the foreach backend handles every device")
        backend = ALL[self._name]
        reason = backend.why_unavailable(device)
        if reason is not None:
            raise RuntimeError(f"{self._source}={self._name!r} cannot handle {device.type} tensors: {reason}")
        return backend

    def why_foreach(self, device: torch.device) -> str:
        """Return why torch operations handle tensors of a device, for a report."""
        if self.loops:
            return "foreach=False asks for a loop"
        if self.is_intercepted:
            return "a tracer, mode or transform has to see every operation"
        if self._name is not None:
            return f"{self._source}={self._name}"
        backend = self.backend_for(device)
        if backend is not FOREACH:
            return f"gradients that {backend.name} does not handle: gaps in memory, complex, or shared memory"
        asked = (b for b in _AUTOMATIC.values() if b is not FOREACH)
        return ", ".join(f"{b.name}: {b.why_unavailable(device)}" for b in asked)
