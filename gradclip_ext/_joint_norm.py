"""The norm over all ranks: what each of them adds, and how it is put together."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradclip_ext import _dtensors, gradients
from gradclip_ext._dtensors import unwrap
from gradclip_ext._layout import Layout
from gradclip_ext.backends import Selection
from gradclip_ext.gradient_list import GradientList
from gradclip_ext.norms import LARGEST_DIRECT_ORDER, REPORT, on_device, result_dtype
from gradclip_ext.segments import Segments

Copies = Callable[[Any], int]

_INF_BITS = 0x7FF0_0000_0000_0000
_WITHOUT_SIGN = 0x7FFF_FFFF_FFFF_FFFF


class Call(NamedTuple):
    """What a norm is asked of."""

    parameters: Sequence[Tensor]  # what decides which ranks take part, alike on all of them
    owners: Sequence[Tensor]  # the parameters of the tensors
    tensors: Sequence[Tensor]
    selection: Selection
    norm_type: float
    group: Any
    copies: Copies | None


class JointNorm:
    """The norm of tensors over all ranks of a layout.

    Args:
        call: what is asked for.
        layout: the ranks.
        parts: what of each tensor lies on this rank.
        unsummed: positions of the tensors that still have to be summed over ranks.
    """

    def __init__(self, call: Call, layout: Layout, parts: list[Tensor], unsummed: list[int]) -> None:
        self._call = call
        self._layout = layout
        self._parts = parts
        self._unsummed = unsummed
        # A gradient that is missing here may be float64 on another rank, which then returns float64.
        of_parameters = unwrap(call.parameters)[0] if len(parts) < len(call.parameters) else []
        self._dtypes = {t.dtype for t in of_parameters}
        some = parts or of_parameters
        self._device = some[0].device if some else layout.device()
        #: The parts as one list, the class of each, and the weight of each class.
        self.whole: GradientList = GradientList([], [])
        self.numbers: Sequence[int] = ()
        self.weights: list[float] = []
        #: Why there is no norm on this rank. The others get NaN, instead of waiting for this one.
        self.error: Exception | None = None

    def dtype(self) -> torch.dtype:
        """Return the dtype of the result; where a gradient is missing, the parameters decide, too."""
        return result_dtype(self._dtypes | self.whole.dtypes())

    def take(self) -> Tensor:
        """Return the norm in float64.

        Raises:
            Exception: the error of this rank, after the all-reduces that the other ranks wait for.
        """
        error = self.error
        pieces = _dtensors.sum_partials([self._call.tensors[index] for index in self._unsummed])
        norms: list[tuple[float, Tensor]] = []
        if error is None:
            try:
                norms = self._norms(pieces)
            except Exception as caught:
                error = caught
        if error is not None:
            norms = [(1.0, torch.full((), math.nan, dtype=torch.float64, device=self._device))]
        total = self._joined(norms)
        if error is not None:
            raise error
        return total

    def statistics(self, names: Sequence[str] | None) -> Tensor:
        """Return the rows of :meth:`Backend.statistics` with a column for each parameter: of whole gradients,
        in float64, the same on all ranks. Two all-reduces, of 2 T and 3 T numbers."""
        return self._of_each(4, lambda whole: whole.statistics(self._call.norm_type, None)[1], names)

    def norms(self) -> Tensor:
        """Return the norm of each parameter's whole gradient, as above. Two all-reduces of T numbers."""
        return self._of_each(1, lambda whole: whole.clip_each_(self._call.norm_type, REPORT)[None])[0]

    def _of_each(
        self, count: int, read: Callable[[GradientList], Tensor], names: Sequence[str] | None = None
    ) -> Tensor:
        """Return what ``read`` says of every gradient, joined over the ranks: ``count`` rows of norms,
        largest magnitudes and numbers that add up, with a column for each parameter.

        All ranks need the same T parameters in the same order. The order of the norms is above 0.
        """
        error, rows = self.error, None
        pieces = _dtensors.sum_partials([self._call.tensors[index] for index in self._unsummed])
        if error is None:
            try:
                rows = self._own_rows(count, read, pieces)
            except Exception as caught:
                error = caught  # raised after the all-reduces that the other ranks wait for
        if rows is None:
            rows = torch.full((count + 1, len(self._call.parameters)), math.nan, dtype=torch.float64)
        self._check_same_parameters(names, error)
        *own, weights = rows.to(self._device)
        order = self._call.norm_type
        bits = torch.stack(own[:2]).view(torch.int64) & _WITHOUT_SIGN  # as in _dominant
        norms, *largest = self._layout.all_reduce(bits, dist.ReduceOp.MAX).view(torch.float64)
        is_ordinary = (norms > 0.0) & (norms < math.inf)
        ratios = torch.where(is_ordinary, own[0] / norms, 0.0)
        powers = ratios.pow(order) if math.isfinite(order) else ratios
        sums = self._layout.all_reduce(torch.stack([powers, *own[2:]]) * weights, dist.ReduceOp.SUM)
        if error is not None:
            raise error
        if math.isfinite(order):
            norms = torch.where(is_ordinary, norms * sums[0].pow(1.0 / order), norms)
        # A share of 1/3 of a count, for a copy on each of three ranks, is not exact.
        return torch.stack([norms, *largest, *sums[1:].round()])

    def _own_rows(self, count: int, read: Callable[[GradientList], Tensor], pieces: list[Tensor]) -> Tensor:
        """Return the rows of this rank's parts and, below them, their weights; 0 without a gradient."""
        rows = torch.zeros(count + 1, len(self._call.parameters), dtype=torch.float64, device=self._device)
        if not self._parts:
            return rows
        whole = self.whole
        if pieces:
            summed = dict(zip(self._unsummed, pieces))
            parts = [summed.get(index, part) for index, part in enumerate(self._parts)]
            whole = gradients.read_only(parts, self._call.selection)
        found = read(whole).to(torch.float64)
        weights = torch.tensor([self.weights[number] for number in self.numbers], dtype=torch.float64)
        found = torch.cat([found, on_device(weights, found.device)[None]])
        return Segments(list(self._call.parameters)).of_parameters(found)

    def _check_same_parameters(self, names: Sequence[str] | None, error: Exception | None) -> None:
        """Raise on all ranks alike if they have different numbers of parameters, whose vectors would be added
        up wrongly or never, or other names, as pipeline stages have.

        Takes one more all-reduce, for which the host waits, so it is done once for a set of parameters and a
        layout: it finds a group that does not fit, not a list that changes later on some ranks.
        """
        count = len(self._call.parameters)
        checksum = 0 if names is None else zlib.crc32("\n".join(names).encode())
        if (count, checksum) in self._layout.agreed:
            return
        bounds = torch.tensor([count, -count, checksum, -checksum], device=self._device)
        most, least, largest, smallest = self._layout.all_reduce(bounds, dist.ReduceOp.MAX).tolist()
        if (most, largest) != (-least, -smallest):
            what = f"between {-least} and {most} parameters, this one {count}"
            raise error or ValueError(
                f"the ranks pass {what if most != -least else 'parameters of different names'}: results for "
                "each parameter need the same parameters in the same order on all ranks of group= and of the "
                "DTensors' meshes (pipeline stages differ: leave their mesh out of group=)"
            )
        self._layout.agreed.add((count, checksum))

    def _norms(self, pieces: list[Tensor]) -> list[tuple[float, Tensor]]:
        """Return the weights that occur, each with the norm of this rank's tensors of that weight."""
        if not pieces and len(set(self.weights)) == 1:
            lists = [(self.weights[0], self.whole)]
        else:
            summed = dict(zip(self._unsummed, pieces))
            by_weight: dict[float, list[Tensor]] = {}
            for index, (part, number) in enumerate(zip(self._parts, self.numbers)):
                by_weight.setdefault(self.weights[number], []).append(summed.get(index, part))
            lists = [(w, gradients.read_only(ts, self._call.selection)) for w, ts in by_weight.items()]
        norms = []
        for weight, tensors in lists:
            if tensors.has_elements():
                norm, _ = tensors.norm(self._call.norm_type, REPORT, torch.float64)
                norms.append((weight, norm.to(self._device)))
        return norms

    def _joined(self, norms: list[tuple[float, Tensor]]) -> Tensor:
        order = self._call.norm_type
        if 0.0 < order <= LARGEST_DIRECT_ORDER:
            return self._sum_of_powers(norms).pow(1.0 / order)
        dominant = self._dominant([norm for _, norm in norms])
        if math.isinf(order):
            return dominant
        total = dominant * self._sum_of_powers([(w, norm / dominant) for w, norm in norms]).pow(1.0 / order)
        return torch.where((dominant > 0.0) & (dominant < math.inf), total, dominant)

    def _sum_of_powers(self, norms: list[tuple[float, Tensor]]) -> Tensor:
        powers = [norm.pow(self._call.norm_type) * weight for weight, norm in norms]
        if not powers:
            powers = [torch.zeros((), dtype=torch.float64, device=self._device)]
        return self._layout.all_reduce(sum(powers[1:], powers[0]), dist.ReduceOp.SUM)

    def _dominant(self, norms: list[Tensor]) -> Tensor:
        """Return the largest norm (for orders above 0) or the smallest one of all ranks, NaN if one is.

        Reduced as the int64 bits, which order floats of 0 and above as their values do, with NaN on top: a
        maximum of floats drops NaN in gloo and NCCL. For the smallest, they are counted down from infinity's.
        """
        is_largest = self._call.norm_type > 0.0
        # What a rank without elements gives: 0, or less than the counted-down bits of any number.
        found = torch.full((), 0 if is_largest else -1, dtype=torch.int64, device=self._device)
        for norm in norms:
            bits = norm.view(torch.int64) & _WITHOUT_SIGN  # a NaN may have one
            found = torch.maximum(found, bits if is_largest else _counted_down(bits))
        found = self._layout.all_reduce(found, dist.ReduceOp.MAX)
        if not is_largest:
            found = torch.where(found < 0, torch.zeros_like(found), _counted_down(found))
        return found.view(torch.float64)


def _counted_down(bits: Tensor) -> Tensor:
    return torch.where(bits <= _INF_BITS, _INF_BITS - bits, bits)
