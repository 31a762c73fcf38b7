"""The triton backend: kernels that read the gradients once and need no CUDA toolkit on the user's machine.

The kernels find the tensors through a table in device memory. An operation takes one launch per dtype in the
list, and a norm one more, whatever the length of the list. memory.py makes and keeps the tables, launch.py
compiles and launches, kernels.py holds the kernels.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradclip_ext.backends.base import TensorList
from gradclip_ext.backends.foreach import ForeachBackend, SegmentsByForeach
from gradclip_ext.backends.triton.launch import (
    Call,
    CompileError,
    Launch,
    Launcher,
    bits_of,
    options,
    rounded_bits,
    tile_of,
    tile_of_vectors,
)
from gradclip_ext.backends.triton.memory import Table, Workspace, prepared
from gradclip_ext.norms import REPORT, Coefficient, Rule

if TYPE_CHECKING:
    from gradclip_ext.backends.base import Backend

# For what the Triton kernels do not do.
_FOREACH = ForeachBackend()
_OLDEST_CAPABILITY = (7, 0)

# Vectors that a lane has in flight. With 8, norm_kernel takes 100 registers for half types, so that 4
# programs fit on an SM of an H100. They have 64 KiB in flight; its memory latency needs about 40. The
# kernels that also write take half as many registers and reach the same with 4 vectors.
_NORM_VECS = 8
_UPDATE_VECS = 4
# finalize_kernel runs on one SM, where it needs many loads in flight.
_FINALIZE_LANES = 512
_FINALIZE_BLOCK = 4096


class TritonBackend(SegmentsByForeach):
    """Triton kernels on CUDA and ROCm devices, and on CPU tensors in Triton's interpreter.

    A kernel is compiled when it is first needed, which takes about a second; Triton needs a C compiler for
    the code that launches it. Before a CUDA graph is captured, run the same calls once.

    Args:
        fallback: the backend that is used, after one warning, once Triton has failed to compile a kernel.
            It is set if the backend is chosen automatically; the interpreter is then never used. None, for
            callers who have named this backend, raises the error.
    """

    name = "triton"

    def __init__(self, fallback: Backend | None = None) -> None:
        self._fallback = fallback
        self._reasons: dict[torch.device, str | None] = {}
        self._launcher = Launcher()

    # ------------------------------------------------------------ operations

    def norm(
        self, tensors: TensorList, norm_type: float, rule: Rule, dtype: torch.dtype
    ) -> tuple[Tensor, Coefficient]:
        if not isinstance(rule.max_norm, float) or rule.zero_if_nonfinite:
            norm, _ = self.norm(tensors, norm_type, REPORT, dtype)
            return norm, rule.clip_coef(norm)
        norm = torch.empty((), dtype=dtype, device=tensors.device)
        clip_coef = None if rule.max_norm == math.inf else torch.empty_like(norm)
        try:
            with prepared(tensors) as (workspace, table):
                self._launcher.enqueue(
                    self._norm_calls(workspace, table, norm_type, norm, clip_coef, rule.max_norm)
                )
        except CompileError as error:
            return self._fallback_for(error, tensors.device).norm(tensors, norm_type, rule, dtype)
        return norm, 1.0 if clip_coef is None else clip_coef

    def scale_(self, tensors: TensorList, clip_coef: Coefficient, may_zero: bool = False) -> None:
        if may_zero or (isinstance(clip_coef, Tensor) and clip_coef.dim()):
            return _FOREACH.scale_(tensors, clip_coef, may_zero)
        if not isinstance(clip_coef, Tensor):
            clip_coef = torch.full((), clip_coef, dtype=torch.float64, device=tensors.device)
        try:
            with prepared(tensors) as (workspace, table):
                self._launcher.enqueue(self._scale_calls(workspace, table, clip_coef))
        except CompileError as error:
            self._fallback_for(error, tensors.device).scale_(tensors, clip_coef)

    def clamp_(self, tensors: TensorList, min: float, max: float) -> None:
        try:
            with prepared(tensors) as (workspace, table):
                self._launcher.enqueue(self._clamp_calls(workspace, table, min, max))
        except CompileError as error:
            self._fallback_for(error, tensors.device).clamp_(tensors, min, max)

    # ------------------------------------------------------------ launches

    def _norm_calls(
        self,
        workspace: Workspace,
        table: Table,
        norm_type: float,
        norm: Tensor,
        clip_coef: Tensor | None,
        max_norm: float,
    ) -> list[Call]:
        """Return the launches that write the norm and, unless ``clip_coef`` is None, the coefficient."""
        key = "norm", norm_type, norm.dtype, clip_coef is None
        if key not in table.launches:
            order = norm_type if norm_type in (1.0, 2.0, math.inf) else 0.0
            partials, p = workspace.partials(table.chunks), bits_of(norm_type)

            def shape(vec: int) -> dict[str, Any]:
                return {"ORDER": order, **tile_of(_NORM_VECS, vec)}

            launches = self._launcher.over_groups("norm_kernel", (partials, p), shape, workspace, table)
            finalize = Launch(
                self._launcher.kernels.finalize_kernel,
                1,
                (partials, p, table.chunks),
                {"ORDER": order, "BLOCK": _FINALIZE_BLOCK},
                options(_FINALIZE_LANES, workspace),
            )
            table.launches[key] = [*launches, finalize]
        *launches, finalize = table.launches[key]
        return [*((launch, ()) for launch in launches), (finalize, (norm, clip_coef, bits_of(max_norm)))]

    def _scale_calls(self, workspace: Workspace, table: Table, clip_coef: Tensor) -> list[Call]:
        key = "scale", clip_coef.dtype
        if key not in table.launches:
            table.launches[key] = self._launcher.over_groups(
                "scale_kernel", (), _tile_in_place, workspace, table
            )
        return [(launch, (clip_coef,)) for launch in table.launches[key]]

    def _clamp_calls(self, workspace: Workspace, table: Table, min: float, max: float) -> list[Call]:
        key = ("clamp",)
        if key not in table.launches:
            table.launches[key] = self._launcher.over_groups(
                "clamp_kernel", (), _tile_in_place, workspace, table
            )
        bounds = bits_of(min), bits_of(max)
        arguments = [tuple(rounded_bits(bits, group.dtype) for bits in bounds) for group in table.groups]
        return list(zip(table.launches[key], arguments))

    def _fallback_for(self, error: CompileError, device: torch.device) -> Backend:
        """Return the fallback, with a warning the first time; raise the error if there is none."""
        if self._fallback is None:
            raise error
        if self._reasons.get(device) is None:
            self._reasons[device] = str(error)
            warnings.warn(
                f"{error}\nbackend={self._fallback.name!r} is used from now on", RuntimeWarning, stacklevel=2
            )
        return self._fallback

    # ------------------------------------------------------------ where it runs

    def why_unavailable(self, device: torch.device) -> str | None:
        if device not in self._reasons:
            self._reasons[device] = self._find_reason(device)
        return self._reasons[device]

    def _find_reason(self, device: torch.device) -> str | None:
        if device.type not in ("cuda", "cpu"):
            return f"its kernels have been written for CUDA and ROCm devices, not for {device.type}"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "torch finds no CUDA or ROCm device"
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
            return "it runs on the CPU under TRITON_INTERPRET=1 only, for tests"
        if device.type == "cpu" and self._fallback is not None:
            return "Triton's interpreter is slow and only used if this backend is named"
        try:
            return self._launcher.load() or self._why_unfit(device)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "triton":
                return "Triton is not installed: pip install triton"
            return f"Triton cannot be used here: {type(error).__name__}: {error}"

    def _why_unfit(self, device: torch.device) -> str | None:
        """Return why Triton, once loaded, does not support a device, or None."""
        if device.type == "cpu":
            if not self._launcher.is_interpreted:
                return "TRITON_INTERPRET was set after Triton had been imported"
            # Some of Triton's interpreters fail with a NumPy that is newer than they are.
            self.norm(
                TensorList([torch.ones(1, dtype=torch.float32, device="cpu")]), 2.0, REPORT, torch.float32
            )
        elif self._launcher.is_interpreted:
            return "TRITON_INTERPRET is set, and the interpreter cannot read GPU memory"
        elif torch.version.hip is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < _OLDEST_CAPABILITY:
                return f"compute capability 7.0 is needed, this device has {capability[0]}.{capability[1]}"
        return None


def _tile_in_place(vec: int) -> dict[str, Any]:
    return tile_of_vectors(_UPDATE_VECS, vec)
