"""The gradients of one call, divided among the backends, and the operations on all of them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from gradclip_ext.backends import FOREACH, foreach_cpu
from gradclip_ext.backends.base import Backend, TensorList, are_contiguous, has_flat_units, is_regular
from gradclip_ext.norms import (
    REPORT,
    AdaptiveRule,
    Coefficient,
    Rule,
    combine_norms,
    on_device,
    result_dtype,
    widest_dtype,
)
from gradclip_ext.segments import positions_of, select

# Tensors of one device and the backend that handles them.
Part = tuple[Backend, TensorList]


class GradientList:
    """The gradients, or other tensors, of one call.

    Args:
        tensors: the tensors in the order given.
        parts: the same tensors by device and backend.
        written: what to write to, where that differs: memory that two gradients share is listed once.
        is_intercepted: see :func:`interception.is_intercepted`.
    """

    #: Whether other ranks wait for this one's part of the norm, even if it has no gradient.
    is_sharded = False

    def __init__(
        self,
        tensors: Sequence[Tensor],
        parts: list[Part],
        written: list[Part] | None = None,
        is_intercepted: bool = False,
    ) -> None:
        self.tensors = tensors
        self._parts = parts
        self._written = parts if written is None else written
        self._is_intercepted = is_intercepted

    def dtypes(self) -> Set[torch.dtype]:
        if len(self._parts) == 1:
            return self._parts[0][1].dtypes
        return {dtype for _, tensors in self._parts for dtype in tensors.dtypes}

    def handled_by(self) -> list[tuple[str, torch.device]]:
        """Return for each part of the list which backend handles it, on which device."""
        return [(backend.name, tensors.device) for backend, tensors in self._parts]

    def has_elements(self) -> bool:
        """Tell whether some tensor is not empty."""
        return any(tensors.has_elements() for _, tensors in self._parts)

    def norm(
        self, norm_type: float, rule: Rule, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Coefficient]:
        """Return the norm of all elements as one vector, and the coefficient that the rule makes of it.

        The norm is a new 0-d tensor on the device of the first gradient, of the dtype given or else float64
        if one gradient is and float32 if none. Between devices only one 0-d tensor each travels.
        """
        dtype = dtype or result_dtype(self.dtypes())
        device = self.tensors[0].device
        parts = [part for part in self._parts if part[1].has_elements()]
        if not norm_type > 0.0:
            parts = [(b if b.name == "foreach" else FOREACH, tensors) for b, tensors in parts]
        if len(parts) == 1 and parts[0][1].device == device:
            backend, tensors = parts[0]
            if not callable(rule.max_norm):
                return backend.norm(tensors, norm_type, rule, dtype)
            total = backend.norm(tensors, norm_type, REPORT, dtype)[0]
        elif not parts:
            total = torch.zeros((), dtype=dtype, device=device)
        else:
            wide = widest_dtype(device)
            norms = [
                backend.norm(tensors, norm_type, REPORT, widest_dtype(tensors.device))[0].to(device).to(wide)
                for backend, tensors in parts
            ]
            total = combine_norms(norms, norm_type).to(dtype)
        return total, rule.clip_coef(total)

    def norm_dtype(self) -> torch.dtype:
        """Return the dtype of a norm that users get."""
        return result_dtype(self.dtypes())

    def wide_norm(self, norm_type: float) -> Tensor:
        """Return the norm in float64, which scaled gradients need: float32 may not hold theirs."""
        return self.norm(norm_type, REPORT, widest_dtype(self.tensors[0].device))[0]

    def clip_each_(self, norm_type: float, rule: Rule) -> Tensor:
        """Scale every gradient by the coefficient for its own norm, and return those norms, before scaling.

        Args:
            norm_type: the order of the norms.
            rule: a number as max_norm or, on the device of the first gradient, a tensor with one element or
                one for each gradient. REPORT changes nothing.
        """
        dtype, device = result_dtype(self.dtypes()), self.tensors[0].device
        parts = [(FOREACH if not norm_type > 0.0 and b.name != "foreach" else b, ts) for b, ts in self._parts]
        is_whole = len(parts) == 1 and parts[0][1].device == device
        if rule is REPORT or (is_whole and self._written is self._parts):
            if rule is not REPORT:
                self._bump_versions()
            norms = [on_device(b.clip_each_(ts, norm_type, rule, dtype), device) for b, ts in parts]
            if len(norms) == 1:
                return norms[0]
            listed = [t for _, ts in parts for t in ts.tensors]
            return select(torch.cat(norms), positions_of(self.tensors, listed))
        each = self.clip_each_(norm_type, REPORT)
        self.scale_(rule.clip_coef(each), rule.zero_if_nonfinite)
        return each

    def norms(self, norm_type: float) -> Tensor:
        """Return the norm of each gradient."""
        return self.clip_each_(norm_type, REPORT)

    def statistics(self, norm_type: float, names: Sequence[str] | None) -> tuple[Tensor, Tensor]:
        """Return the norm of all elements, and the rows of :meth:`Backend.statistics` for all tensors, in
        float64 on the device of the first one. Over many ranks, all need the same names."""
        device = self.tensors[0].device
        totals, rows = [], []
        for backend, tensors in self._parts:
            if not norm_type > 0.0 and backend.name != "foreach":
                backend = FOREACH  # noqa: PLW2901
            packed = backend.statistics(tensors, norm_type)
            packed = on_device(packed, device).to(widest_dtype(device))
            rows.append(packed[1:].view(4, -1))
            if tensors.has_elements():
                totals.append(packed[0])
        if len(rows) == 1:
            return packed[0], rows[0]
        listed = [t for _, tensors in self._parts for t in tensors.tensors]
        total = combine_norms(totals, norm_type) if totals else packed[0]
        return total, select(torch.cat(rows, dim=-1), positions_of(self.tensors, listed))

    def scale_(self, clip_coef: Coefficient, may_zero: bool = False) -> None:
        """Multiply every gradient by the coefficient; write nothing where it is 1 or more.

        Args:
            clip_coef: a number, a 0-d tensor, or a vector with one coefficient for each gradient. Memory
                that gradients share is scaled once, by the first one's.
            may_zero: the coefficient may be ZERO, for +0.0 in place of every element.
        """
        self._bump_versions()
        if not isinstance(clip_coef, Tensor):
            if clip_coef >= 1.0:
                return
        elif clip_coef.dim():
            return self._scale_each_(clip_coef, may_zero)
        for backend, tensors in self._written:
            moved = clip_coef if isinstance(clip_coef, float) else on_device(clip_coef, tensors.device)
            backend.scale_(tensors, moved, may_zero)

    def _scale_each_(self, clip_coefs: Tensor, may_zero: bool) -> None:
        for backend, tensors in self._written:
            coefs = clip_coefs
            if len(self._written) > 1 or len(tensors.tensors) < len(self.tensors):
                coefs = select(clip_coefs, positions_of(tensors.tensors, self.tensors))
            backend.scale_(tensors, on_device(coefs, tensors.device), may_zero)

    def multiply_(self, factor: Tensor) -> None:
        """Multiply every gradient by a 0-d tensor, 0 or more or NaN, that may also be larger than 1.

        What only the device knows goes to foreach: other backends write nothing for a factor from 1 on.
        """
        self._bump_versions()
        for backend, tensors in self._written:
            moved = on_device(factor, tensors.device)
            if not foreach_cpu.host_sees(moved):
                FOREACH.scale_(tensors, moved)
            elif not moved.item() > 1.0:
                backend.scale_(tensors, moved)
            else:
                for tensor in tensors.tensors:
                    tensor.mul_(moved)

    def as_result(self, total_norm: Tensor) -> Tensor:
        """Return a norm as the caller gets it."""
        return total_norm

    def on_this_rank(self, tensor: Tensor) -> Tensor:
        """Return what of a gradient lies on this rank."""
        return tensor

    def clip_adaptive_(self, weights: Sequence[Tensor], rule: AdaptiveRule) -> None:
        """Scale each unit of every gradient by the coefficient for its norm and its weight's.

        Args:
            weights: one for each gradient, of its shape and on its device. Memory that gradients share is
                scaled once, by the first one's weight.
            rule: makes the coefficient.
        """
        self._bump_versions()
        for backend, tensors in self._written:
            beside = list(weights)
            if len(self._written) > 1 or len(tensors.tensors) < len(self.tensors):
                beside = [weights[i] for i in positions_of(tensors.tensors, self.tensors)]
            kernels = backend if rule.norm_type > 0.0 else FOREACH
            for part in _by_layout_of_units(kernels, tensors, beside):
                part.backend.clip_adaptive_(part.grads, part.weights, rule)

    def clamp_(self, min: float, max: float) -> None:
        """Clamp every gradient to [min, max]."""
        self._bump_versions()
        for backend, tensors in self._written:
            backend.clamp_(tensors, min, max)

    def _bump_versions(self) -> None:
        """Count one more change, as torch's in-place operations do: a backward that saved a gradient
        relies on it. Done even if nothing is written, before anything is."""
        if self._is_intercepted:
            return  # then torch's operations count
        torch.autograd.graph.increment_version(self.tensors)  # passes over inference tensors


class _Weighted(NamedTuple):
    backend: Backend
    grads: TensorList
    weights: TensorList


def _by_layout_of_units(backend: Backend, grads: TensorList, weights: list[Tensor]) -> list[_Weighted]:
    """Set apart the gradients and weights whose units kernels cannot read as ranges of memory."""
    if backend.name == "foreach" or (are_contiguous(weights) and are_contiguous(grads.tensors)):
        return [_Weighted(backend, grads, TensorList(weights))]
    parts: list[_Weighted] = []
    fits = [is_regular(w) and has_flat_units(w) and has_flat_units(g) for g, w in zip(grads.tensors, weights)]
    for of, wanted in ((backend, True), (FOREACH, False)):
        pairs = [pair for pair, fit in zip(zip(grads.tensors, weights), fits) if fit is wanted]
        if pairs:
            parts.append(_Weighted(of, TensorList([g for g, _ in pairs]), TensorList([w for _, w in pairs])))
    return parts
