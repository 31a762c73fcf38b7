"""The triton backend: kernels that read the gradients once and need no CUDA toolkit on the user's machine.

The kernels find the tensors through a table in device memory. An operation takes one launch per dtype in the
list, and a norm one more, whatever the length of the list. memory.py makes and keeps the tables, launch.py
compiles and launches, and the files named ``*kernels.py`` hold the kernels.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradclip_ext.backends.base import KERNEL_DTYPES, TensorList
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
from gradclip_ext.backends.triton.memory import LONGEST_ROW, Table, Workspace, locked_workspace, prepared
from gradclip_ext.backends.triton.units import UnitTable, units_as_bytes
from gradclip_ext.norms import REPORT, AdaptiveRule, Coefficient, Rule, on_device
from gradclip_ext.segments import select

if TYPE_CHECKING:
    from gradclip_ext.backends.base import Backend

_OLDEST_CAPABILITY = (7, 0)

# Vectors that a lane has in flight. With 8, the kernels that sum take at most 128 registers, so that 4
# programs fit on an SM of an H100. They have 64 KiB in flight; its memory latency needs about 40. The
# kernels that also write take half as many registers and reach the same with 4 vectors.
_NORM_VECS = 8
_UPDATE_VECS = 4
# finalize_kernel runs on one SM, where it needs many loads in flight.
_FINALIZE_LANES = 512
_FINALIZE_BLOCK = 4096
# float64 numbers that norm_kernel and statistics_kernel write per chunk.
_NORM_ROW = 2
_STATISTICS_ROW = LONGEST_ROW


class TritonBackend:
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
        norm = torch.empty((), dtype=dtype, device=tensors.device)
        clip_coef = None if _only_reports(rule) else torch.empty_like(norm)
        limit, bits = _limit_of(rule, tensors.device)
        try:
            with prepared(tensors) as (workspace, table):
                calls = self._norm_calls(workspace, table, norm_type)
                changing = norm, clip_coef, limit, bits
                zero = rule.zero_if_nonfinite
                calls.append(self._finalize_call(workspace, table, norm_type, changing, zero))
                self._launcher.enqueue(calls)
        except CompileError as error:
            return self._fallback_for(error, tensors.device).norm(tensors, norm_type, rule, dtype)
        return norm, 1.0 if clip_coef is None else clip_coef

    def scale_(self, tensors: TensorList, clip_coef: Coefficient, may_zero: bool = False) -> None:
        if not isinstance(clip_coef, Tensor):
            clip_coef = torch.full((), clip_coef, dtype=torch.float64, device=tensors.device)
        try:
            with prepared(tensors) as (workspace, table):
                if may_zero or clip_coef.dim():
                    coefs = _of_filled(clip_coef, tensors, table)
                    self._launcher.enqueue(self._scale_each_calls(workspace, table, coefs))
                else:
                    self._launcher.enqueue(self._scale_calls(workspace, table, clip_coef))
        except CompileError as error:
            self._fallback_for(error, tensors.device).scale_(tensors, clip_coef, may_zero)

    def clip_each_(self, tensors: TensorList, norm_type: float, rule: Rule, dtype: torch.dtype) -> Tensor:
        try:
            with prepared(tensors) as (workspace, table):
                norms = torch.empty(table.tensors, dtype=dtype, device=tensors.device)
                coefs = None if _only_reports(rule) else torch.empty_like(norms)
                limits, bits = _limit_of(rule, tensors.device)
                stride = 0 if limits is None else limits.dim()
                limits = None if limits is None else _of_filled(limits, tensors, table)
                if table.tensors:
                    calls = self._norm_calls(workspace, table, norm_type)
                    changing = norms, coefs, limits, bits, stride
                    zero = rule.zero_if_nonfinite
                    calls.append(self._finalize_each_call(workspace, table, norm_type, changing, zero))
                    if coefs is not None:
                        calls += self._scale_each_calls(workspace, table, coefs)
                    self._launcher.enqueue(calls)
        except CompileError as error:
            return self._fallback_for(error, tensors.device).clip_each_(tensors, norm_type, rule, dtype)
        return _of_all(norms, tensors)

    def statistics(self, tensors: TensorList, norm_type: float) -> Tensor:
        try:
            with prepared(tensors) as (workspace, table):
                count = table.tensors
                packed = torch.empty(1 + 4 * count, dtype=torch.float64, device=tensors.device)
                if count:
                    self._launcher.enqueue(self._statistics_calls(workspace, table, norm_type, packed))
                else:
                    packed.zero_()
        except CompileError as error:
            return self._fallback_for(error, tensors.device).statistics(tensors, norm_type)
        if count == len(tensors.tensors):
            return packed
        return torch.cat([packed[:1], _of_all(packed[1:].view(4, count), tensors).flatten()])

    def clip_adaptive_(self, grads: TensorList, weights: TensorList, rule: AdaptiveRule) -> None:
        key = grads.columns(), weights.columns(), units_as_bytes(grads)
        try:
            with locked_workspace(grads.device) as workspace:
                table = workspace.uploaded(key, lambda: UnitTable(*key))
                self._launcher.enqueue(
                    [
                        *self._large_unit_calls(workspace, table, rule),
                        *self._unit_calls(workspace, table, rule),
                    ]
                )
        except CompileError as error:
            self._fallback_for(error, grads.device).clip_adaptive_(grads, weights, rule)

    def clamp_(self, tensors: TensorList, min: float, max: float) -> None:
        try:
            with prepared(tensors) as (workspace, table):
                self._launcher.enqueue(self._clamp_calls(workspace, table, min, max))
        except CompileError as error:
            self._fallback_for(error, tensors.device).clamp_(tensors, min, max)

    # ------------------------------------------------------------ launches

    def _norm_calls(self, workspace: Workspace, table: Table, norm_type: float) -> list[Call]:
        """Return the launches that write the partials of a norm."""
        key = "norm", norm_type
        if key not in table.launches:
            shape = _shape_of_sums(ORDER=_order_of(norm_type))
            table.launches[key] = self._launcher.over_groups(
                "norm_kernel", (table.partials, bits_of(norm_type)), shape, workspace, table
            )
        return [(launch, ()) for launch in table.launches[key]]

    def _finalize_call(
        self,
        workspace: Workspace,
        table: Table,
        norm_type: float,
        changing: tuple[Any, ...],
        zero: bool = False,
        row: int = _NORM_ROW,
    ) -> Call:
        """Return the launch that writes the norm of all tensors and its coefficient."""
        key = "finalize", norm_type, zero, row, *map(_dtype_of, changing)
        if key not in table.launches:
            arguments = table.partials, bits_of(norm_type), table.chunks
            constants = {"ORDER": _order_of(norm_type), "ZERO": zero, "ROW": row}
            table.launches[key] = [self._final_launch("finalize_kernel", 1, arguments, constants, workspace)]
        return table.launches[key][0], changing

    def _finalize_each_call(
        self, workspace: Workspace, table: Table, norm_type: float, changing: tuple[Any, ...], zero: bool
    ) -> Call:
        """Return the launch that writes the norm of each tensor and its coefficient."""
        key = "finalize_each", norm_type, zero, *map(_dtype_of, changing)
        if key not in table.launches:
            arguments = table.on_device, table.partials, table.positions, bits_of(norm_type)
            constants = {"ORDER": _order_of(norm_type), "ZERO": zero, "ROW": _NORM_ROW}
            table.launches[key] = [
                self._final_launch("finalize_each_kernel", table.tensors, arguments, constants, workspace)
            ]
        return table.launches[key][0], changing

    def _statistics_calls(
        self, workspace: Workspace, table: Table, norm_type: float, packed: Tensor
    ) -> list[Call]:
        """Return the launches that write the statistics of a list, as :meth:`Backend.statistics` has them."""
        key = "statistics", norm_type
        if key not in table.launches:
            order, p = _order_of(norm_type), bits_of(norm_type)
            shape = _shape_of_sums(ORDER=order, ROW=_STATISTICS_ROW)
            arguments = table.on_device, table.partials, table.positions, p, table.tensors
            constants = {"ORDER": order, "ROW": _STATISTICS_ROW}
            table.launches[key] = [
                *self._launcher.over_groups(
                    "statistics_kernel", (table.partials, p), shape, workspace, table
                ),
                self._final_launch(
                    "finalize_statistics_kernel", table.tensors, arguments, constants, workspace
                ),
            ]
        *launches, finalize = table.launches[key]
        total = packed, None, None, 0  # the norm is the first number
        return [
            *((launch, ()) for launch in launches),
            (finalize, (packed,)),
            self._finalize_call(workspace, table, norm_type, total, row=_STATISTICS_ROW),
        ]

    def _final_launch(
        self,
        kernel: str,
        programs: int,
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        workspace: Workspace,
    ) -> Launch:
        return Launch(
            getattr(self._launcher.kernels, kernel),
            programs,
            arguments,
            {**constants, "BLOCK": _FINALIZE_BLOCK},
            options(_FINALIZE_LANES, workspace),
        )

    def _scale_each_calls(self, workspace: Workspace, table: Table, coefs: Tensor) -> list[Call]:
        key = "scale_each", coefs.dtype
        if key not in table.launches:
            table.launches[key] = self._launcher.over_groups(
                "scale_each_kernel", (table.positions,), _tile_in_place, workspace, table
            )
        return [(launch, (coefs, coefs.dim())) for launch in table.launches[key]]

    def _unit_calls(self, workspace: Workspace, table: UnitTable, rule: AdaptiveRule) -> list[Call]:
        """Return the launches that clip all units but the large ones."""
        key = "units", rule.norm_type
        if key not in table.launches:
            order, p = _order_of(rule.norm_type), bits_of(rule.norm_type)
            table.launches[key] = self._launcher.over_units(order, p, workspace, table)
        numbers = bits_of(rule.clip_factor), bits_of(rule.eps)
        return [(launch, numbers) for launch in table.launches[key]]

    def _large_unit_calls(self, workspace: Workspace, table: UnitTable, rule: AdaptiveRule) -> list[Call]:
        """Compute the norms of the large units, and return the launches that scale them."""
        if table.large is None:
            return []
        tables = [workspace.table(columns) for columns in table.large]
        norms = torch.empty(2, tables[0].tensors, dtype=torch.float64, device=workspace.device)
        calls = []
        for of_units, out in zip(tables, norms.unbind()):
            calls += self._norm_calls(workspace, of_units, rule.norm_type)
            changing = out, None, None, 0, 0
            calls.append(self._finalize_each_call(workspace, of_units, rule.norm_type, changing, zero=False))
        self._launcher.enqueue(calls)
        return self._scale_each_calls(workspace, tables[0], rule.clip_coef(*norms.unbind()))

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


def _shape_of_sums(**constants: Any) -> Callable[[int], dict[str, Any]]:
    return lambda vec: {**constants, **tile_of(_NORM_VECS, vec)}


def _order_of(norm_type: float) -> float:
    return norm_type if norm_type in (1.0, 2.0, math.inf) else 0.0


def _dtype_of(value: Any) -> Any:
    return getattr(value, "dtype", type(value))


def _only_reports(rule: Rule) -> bool:
    return isinstance(rule.max_norm, float) and rule.max_norm == math.inf and not rule.zero_if_nonfinite


def _limit_of(rule: Rule, device: torch.device) -> tuple[Tensor | None, int]:
    """Return the limit as kernels take it: a tensor of one of their dtypes, or a number's bits."""
    limit = rule.max_norm
    if isinstance(limit, float):
        return None, bits_of(limit)
    assert isinstance(limit, Tensor)
    limit = on_device(limit, device)
    return (limit if limit.dtype in KERNEL_DTYPES else limit.double()).contiguous(), 0


def _of_filled(values: Tensor, tensors: TensorList, table: Table) -> Tensor:
    """Return the values of the tensors that have elements; a table has no others."""
    if not values.dim() or table.tensors == len(tensors.tensors):
        return values.contiguous()
    return select(values, [i for i, t in enumerate(tensors.tensors) if t.numel() > 0])


def _of_all(values: Tensor, tensors: TensorList) -> Tensor:
    """Return values [..., T] for all tensors: those of the tensors with elements, and 0 without any."""
    if values.shape[-1] == len(tensors.tensors):
        return values
    indices = iter(range(values.shape[-1]))
    return select(values, [next(indices) if t.numel() > 0 else None for t in tensors.tensors])
