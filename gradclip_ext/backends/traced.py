"""What torch.compile puts into its graph: norms as operations of this package, everything else as torch's.

A norm that is traced becomes a loop over each gradient, in float64 where nothing may depend on a value. That
takes long to compile, and on a CPU many times as long to run as a kernel does. The compiler does not look
into an operation, in which the backends run as they do without a compiler. Products and clamps are traced:
they fuse with what comes next, an optimizer's step for instance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradclip_ext.backends.base import TensorList
from gradclip_ext.backends.foreach import ForeachBackend
from gradclip_ext.interception import is_intercepted
from gradclip_ext.norms import REPORT, Coefficient, Rule, result_dtype, widest_dtype

if TYPE_CHECKING:
    from gradclip_ext.gradient_list import GradientList


class TracedBackend(ForeachBackend):
    """Tensors that torch.compile traces.

    Args:
        backend, foreach: the arguments of the call, which select the backends when the compiled code runs.
    """

    def __init__(self, backend: str | None, foreach: bool | None) -> None:
        super().__init__(batched=foreach is not False)
        self._backend, self._foreach = backend, foreach

    def norm(
        self, tensors: TensorList, norm_type: float, rule: Rule, dtype: torch.dtype
    ) -> tuple[Tensor, Coefficient]:
        norm = torch.ops.gradclip_ext.norm(
            list(tensors.tensors), norm_type, self._backend, self._foreach, dtype
        )
        return norm, rule.clip_coef(norm)

    def statistics(self, tensors: TensorList, norm_type: float) -> Tensor:
        packed: Tensor = torch.ops.gradclip_ext.statistics(
            list(tensors.tensors), norm_type, self._backend, self._foreach
        )
        return packed

    def _norms(self, tensors: TensorList, norm_type: float) -> Tensor:
        norms: Tensor = torch.ops.gradclip_ext.norms(
            list(tensors.tensors), norm_type, self._backend, self._foreach
        )
        return norms


# ---------------------------------------------------------------- operations


def _read(tensors: list[Tensor], backend: str | None, foreach: bool | None) -> GradientList:
    from gradclip_ext.backends import Selection  # noqa: PLC0415  (both modules import this one)
    from gradclip_ext.gradients import read_only  # noqa: PLC0415

    return read_only(tensors, Selection(backend, foreach, is_intercepted()))


def _norm(
    tensors: list[Tensor], norm_type: float, backend: str | None, foreach: bool | None, dtype: torch.dtype
) -> Tensor:
    return _read(tensors, backend, foreach).norm(norm_type, REPORT, dtype)[0]


def _norms(tensors: list[Tensor], norm_type: float, backend: str | None, foreach: bool | None) -> Tensor:
    return _read(tensors, backend, foreach).norms(norm_type)


def _statistics(tensors: list[Tensor], norm_type: float, backend: str | None, foreach: bool | None) -> Tensor:
    total, rows = _read(tensors, backend, foreach).statistics(norm_type, None)
    return torch.cat([total.reshape(1), rows.reshape(-1)])


def _like_norm(tensors: list[Tensor], *arguments: Any) -> Tensor:
    return tensors[0].new_empty((), dtype=arguments[-1])


def _like_norms(tensors: list[Tensor], *arguments: Any) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=result_dtype({t.dtype for t in tensors}))


def _like_statistics(tensors: list[Tensor], *arguments: Any) -> Tensor:
    return tensors[0].new_empty(1 + 4 * len(tensors), dtype=widest_dtype(tensors[0].device))


def _register() -> None:
    """Make the operations known to torch, which keeps those of the first import of this module."""
    if hasattr(torch.ops.gradclip_ext, "norm"):
        return
    arguments = "Tensor[] tensors, float norm_type, str? backend, bool? foreach"
    for name, signature, function, result in (
        ("norm", f"{arguments}, ScalarType dtype", _norm, _like_norm),
        ("norms", arguments, _norms, _like_norms),
        ("statistics", arguments, _statistics, _like_statistics),
    ):
        torch.library.define(f"gradclip_ext::{name}", f"({signature}) -> Tensor")
        torch.library.impl(f"gradclip_ext::{name}", "default", function)
        torch.library.register_fake(f"gradclip_ext::{name}", result)


_register()
