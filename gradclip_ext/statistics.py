"""Statistics of gradients: norms, largest magnitudes, zeros and non-finite values of every parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradclip_ext import arguments, calls
from gradclip_ext.backends import Selection
from gradclip_ext.gradient_list import GradientList
from gradclip_ext.gradients import grads_of, holds_dtensor, read_gradients, read_tensors
from gradclip_ext.interception import is_intercepted
from gradclip_ext.norms import REPORT, result_dtype
from gradclip_ext.segments import Segments

if TYPE_CHECKING:
    from gradclip_ext.clip import Group


class GradStats:
    """What :func:`get_grad_stats` found, with T parameters in the order given.

    Attributes:
        total_norm: norm of all gradients as one vector, 0-d, float32 or float64 as that of
            :func:`get_total_norm`: pass it to :func:`clip_grads_with_norm_` to clip without another read.
        norms: norm of each gradient, float64 [T]; 0 without a gradient.
        absmax: largest magnitude in each gradient, float64 [T]; NaN if an element is NaN.
        zeros: how many elements of each gradient are 0 (or -0), int64 [T].
        nonfinite: how many elements of each gradient are NaN or infinite, int64 [T].
        numel: how many elements each gradient has, a tuple of T ints; 0 without a gradient.
        names: the names of the parameters, a tuple of T strings: those that were passed, or a module's, or
            else their positions.

    The tensors are on the device of the first gradient (float32 where a device has no float64).

    Examples:
        >>> weight, bias = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
        >>> weight.grad = torch.tensor([3.0, -4.0])
        >>> get_grad_stats([("weight", weight), ("bias", bias)])
        GradStats(total_norm=5.0, 2 parameters)
    """

    def __init__(
        self, total_norm: Tensor, rows: Tensor, numel: tuple[int, ...], names: tuple[str, ...] | None
    ) -> None:
        self.total_norm = total_norm
        self._rows = rows
        self._names = names
        self.numel = numel

    @property
    def norms(self) -> Tensor:
        return self._rows[0]

    @property
    def absmax(self) -> Tensor:
        return self._rows[1]

    @property
    def zeros(self) -> Tensor:
        return self._rows[2].to(torch.int64)

    @property
    def nonfinite(self) -> Tensor:
        return self._rows[3].to(torch.int64)

    @property
    def names(self) -> tuple[str, ...]:
        if self._names is None:
            return tuple(map(str, range(len(self.numel))))
        return self._names

    def to_dict(self, prefix: str = "grad") -> dict[str, float]:
        """Return the totals, and the norm of each parameter, for wandb.log or one add_scalar for each.

        Args:
            prefix: the first part of each key, empty for none.

        Returns:
            ``grad/norm``, ``grad/absmax``, ``grad/zeros`` and ``grad/nonfinite`` of all gradients together,
            and ``grad/norm/NAME`` for each parameter.

        Note:
            Waits for the device: one copy brings all of it to the host.
        """
        values = torch.cat([self.total_norm.to(self._rows.dtype).reshape(1), self._rows.flatten()]).tolist()
        count = len(self.numel)
        total, norms, absmax, zeros, nonfinite = (
            values[:1],
            *(values[1 + row * count : 1 + (row + 1) * count] for row in range(4)),
        )
        found = {
            "norm": total[0],
            # max() loses a NaN that does not come first
            "absmax": math.nan if any(map(math.isnan, absmax)) else max(absmax, default=0.0),
            "zeros": math.fsum(zeros),
            "nonfinite": math.fsum(nonfinite),
            **{f"norm/{name}": norm for name, norm in zip(self.names, norms)},
        }
        return {f"{prefix}/{key}" if prefix else key: value for key, value in found.items()}

    def __repr__(self) -> str:
        return f"GradStats(total_norm={self.total_norm}, {len(self.numel)} parameters)"


@calls.profiled
def get_grad_stats(
    parameters: torch.nn.Module | Tensor | Iterable[Tensor | tuple[str, Tensor]],
    norm_type: float = 2.0,
    *,
    group: Group | Sequence[Group] | None = None,
    copies: Callable[[Any], int] | None = None,
    backend: str | None = None,
) -> GradStats:
    """Return norms, largest magnitudes, zeros and non-finite values of all gradients, from one read.

    What one would log beside the loss. For the orders 1, 2 and inf this reads as many bytes as
    :func:`get_total_norm`.

    Args:
        parameters: a module, a tensor or an iterable of tensors, or of pairs of a name and a tensor, as
            ``named_parameters()`` gives them. Their ``.grad`` is only read. One listed twice counts once;
            one without a gradient counts with 0 everywhere.
        norm_type: order p of the norms, as in :func:`clip_grad_norm_`.
        group: as in :func:`clip_grad_norm_`: the ranks that hold other parts of the same parameters (FSDP1's
            shards, Megatron's tensor-parallel weights, experts).
        copies: as in :func:`clip_grad_norm_`.
        backend: as in :func:`clip_grad_norm_`.

    Returns:
        The statistics, whose tensors stay on the device of the first gradient.

    Raises:
        TypeError: an element or gradient is of the wrong kind (not a tensor, sparse, integer, float8).
        ValueError: the backend does not exist; ranks have different numbers or names of parameters;
            otherwise of group and copies as :func:`clip_grad_norm_`.
        NotImplementedError: norm_type is not above 0 over many ranks; a gradient is a tensor other than a
            DTensor that dispatches by itself.

    Note:
        Does not synchronise with an accelerator, until :meth:`GradStats.to_dict`. Communicates only with
        DTensors, over their meshes, or a group: one all-reduce of 2 T and one of 3 T float64 numbers. The
        results are those of whole gradients and the same on all ranks, which need the same parameters in the
        same order: leave the mesh of pipeline stages out of group, and each stage gets its own. That the
        number of parameters and their names (if names or a module are passed) are the same is checked at the
        first call, for which the host waits. ``numel`` tells of the gradients that this rank has.
        Deterministic; sums are accumulated as in :func:`clip_grad_norm_`. Call it before clipping: afterwards
        the gradients are other ones.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> weight.grad = torch.tensor([3.0, 0.0, -4.0])
        >>> stats = get_grad_stats([("weight", weight)])
        >>> stats.total_norm, stats.zeros
        (tensor(5.), tensor([1]))
        >>> stats.to_dict()["grad/norm/weight"]
        5.0
        >>> clip_grads_with_norm_([weight], 1.0, stats.total_norm)
    """
    listed, names = _named(parameters)
    norm_type = arguments.as_float("norm_type", norm_type)
    with torch.no_grad():
        segments = Segments(listed)
        grads = grads_of(segments.parameters)
        count = len(segments.parameters)
        if names is not None and count < len(listed):
            first = dict(zip(map(id, reversed(listed)), reversed(names)))
            names = [first[id(p)] for p in segments.parameters]
        names_given = None if names is None else tuple(names)
        selection = Selection(backend, None, is_intercepted())
        given = _read(segments.parameters, grads, norm_type, selection, group, copies)
        calls.count("get_grad_stats", given, selection)
        if not given.tensors and not given.is_sharded:
            none = torch.zeros(4, count, dtype=torch.float64, device="cpu")
            total = torch.zeros((), dtype=torch.float32, device="cpu")
            return GradStats(total, none, (0,) * count, names_given)
        total, rows = given.statistics(norm_type, names)
        if not given.is_sharded:
            if norm_type == 2.0 and any(dtype.is_complex for dtype in given.dtypes()):
                # The kernels may take them for the norm, but not for largest magnitudes.
                as_for_norm = read_tensors(grads, selection, norm_type=norm_type)
                assert as_for_norm is not None
                total = as_for_norm.norm(norm_type, REPORT)[0]
            total = total.to(result_dtype(given.dtypes()))
            rows = segments.of_parameters(rows)
        numels = iter(map(Tensor.numel, grads))
        if len(grads) == count:
            numel = tuple(numels)
        else:
            numel = tuple(0 if p.grad is None else next(numels) for p in segments.parameters)
        return GradStats(total, rows, numel, names_given)


def _read(
    parameters: list[Any],
    grads: list[Tensor],
    norm_type: float,
    selection: Selection,
    group: Any,
    copies: Any,
) -> GradientList:
    """Return the gradients, to be read; a rank whose parameters are DTensors takes part without any, too."""
    given: GradientList | None
    if group is not None or copies is not None or holds_dtensor(parameters) or holds_dtensor(grads):
        if not norm_type > 0.0:
            raise NotImplementedError(
                f"get_grad_stats: norm_type={norm_type} is not supported over ranks: pass one above 0"
            )
        given = read_gradients(
            parameters, selection, written=False, norm_type=norm_type, group=group, copies=copies
        )
    else:
        given = read_tensors(grads, selection, norm_type=norm_type, magnitudes=True)
    if given is None:
        raise NotImplementedError(
            "get_grad_stats: not supported for tensors that dispatch by themselves (FakeTensor, or DTensors "
            "under torch.compile or of an unusual placement): pass the local tensors, or use get_total_norm"
        )
    return given


def _named(parameters: Any) -> tuple[list[Any], list[str] | None]:
    """Return the parameters, and their names if the caller gave any."""
    if isinstance(parameters, torch.nn.Module):
        pairs = list(parameters.named_parameters())
    else:
        listed = arguments.as_list("parameters", parameters)
        if not listed or not isinstance(listed[0], tuple):
            return listed, None
        pairs = listed
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                f"element {index} of parameters is a {type(pair).__name__}, after pairs of a name and a "
                "tensor: pass pairs only, or tensors only"
            )
    arguments.raise_if_not_tensors("parameters", [pair[1] for pair in pairs])
    return [pair[1] for pair in pairs], [pair[0] for pair in pairs]
