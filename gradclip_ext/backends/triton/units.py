"""The table of units of adaptive clipping, as adaptive_kernels.py reads it."""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradclip_ext.backends.base import KERNEL_DTYPES, TensorList, units_of
from gradclip_ext.backends.triton.memory import CHUNK_BYTES, read_columns

# Elements of a unit that a program reads at a time: units at a time. Wide tiles have 32 elements for each of
# 128 lanes, which are 64 bytes in flight for half types. A lane keeps several float64 numbers for each of its
# units, so that more narrow units than these spill registers.
_ROWS_OF_WIDTH = {16: 32, 256: 4, 1024: 4}
_WIDEST = max(_ROWS_OF_WIDTH)
# Programs share the work in runs of about so many bytes of gradients.
_RUN_BYTES = CHUNK_BYTES // 2
# A larger unit would keep one program busy when all other ones are done, which on an H100 read this in 10 us.
_MAX_UNIT_BYTES = 4 * CHUNK_BYTES


class UnitGroup(NamedTuple):
    """The tensors [first, last) of a table, which are of one dtype, have weights of one dtype and units of
    similar lengths; the width of their tiles, and their number of runs."""

    dtype: torch.dtype
    weight_dtype: torch.dtype
    width: int
    first: int
    last: int
    runs: int

    @property
    def tile(self) -> dict[str, int]:
        return {"ROWS": _ROWS_OF_WIDTH[self.width], "COLS": self.width}


class UnitTable:
    """The units of gradients and weights, of which large ones are apart.

    ``rows`` is the table that adaptive_kernels.py describes, followed by the one of the weights, which is
    ``weights`` on the device. ``large`` has the columns of those units of gradients that are too large for
    one program, as if each were a tensor, and those of their weights.
    """

    on_device: Tensor

    def __init__(self, grads: bytes, weights: bytes, units: bytes) -> None:
        self.groups: list[UnitGroup] = []
        self.rows: array[int] = array("q")
        self._of_weights: array[int] = array("q")
        self.launches: dict[tuple[Any, ...], list[Any]] = {}
        grouped: dict[tuple[int, int, int], list[tuple[int, int, int, int]]] = {}
        large: tuple[list[tuple[int, int, int]], ...] = [], []
        pairs = zip(zip(*read_columns(grads)), zip(*read_columns(weights)), array("q", units))
        for (address, numel, code), (weight, _, weight_code), count in pairs:
            length, itemsize = numel // count, KERNEL_DTYPES[code].itemsize
            if length * itemsize <= _MAX_UNIT_BYTES:
                width = next((width for width in _ROWS_OF_WIDTH if length <= width), _WIDEST)
                grouped.setdefault((code, weight_code, width), []).append((address, weight, count, length))
                continue
            for start in range(0, numel, length):
                large[0].append((address + start * itemsize, length, code))
                large[1].append((weight + start * KERNEL_DTYPES[weight_code].itemsize, length, weight_code))
        self.runs: int = 0
        for (code, weight_code, width), tensors in grouped.items():
            self._add_group(KERNEL_DTYPES[code], KERNEL_DTYPES[weight_code], width, tensors)
        self.tensors: int = len(self.rows) // 3
        self.rows.extend((0, 0, self.runs))
        self.rows.extend(self._of_weights)
        self.large: tuple[bytes, ...] | None = tuple(map(_as_columns, large)) if large[0] else None

    def _add_group(
        self,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        width: int,
        tensors: list[tuple[int, int, int, int]],
    ) -> None:
        first, before, of_tile = len(self.rows) // 3, self.runs, _ROWS_OF_WIDTH[width]
        for address, weight, count, length in tensors:
            per_run = max(_RUN_BYTES // (length * dtype.itemsize), 1)
            if length * dtype.itemsize <= CHUNK_BYTES:
                per_run = max(per_run // of_tile, 1) * of_tile  # whole tiles
            self.rows.extend((address, count, self.runs))
            self._of_weights.extend((weight, length, per_run))
            self.runs += -(-count // per_run)
        self.groups.append(
            UnitGroup(dtype, weight_dtype, width, first, len(self.rows) // 3, self.runs - before)
        )

    @property
    def weights(self) -> Tensor:
        return self.on_device[3 * self.tensors + 3 :]


def units_as_bytes(grads: TensorList) -> bytes:
    """Return the numbers of units of those gradients that have elements."""
    return array("q", [units_of(grad) for grad in grads.tensors if grad.numel() > 0]).tobytes()


def _as_columns(rows: list[tuple[int, int, int]]) -> bytes:
    addresses, numels, codes = zip(*rows)
    return array("q", addresses).tobytes() + array("q", numels).tobytes() + bytes(codes)
