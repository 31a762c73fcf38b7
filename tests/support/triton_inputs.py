"""For tests of the Triton kernels by themselves: inputs of sizes around the borders of tiles and chunks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradclip_ext import backends
from gradclip_ext.backends.triton import memory

backend = backends.ALL["triton"]
WHY_NOT = backend.why_unavailable(torch.device("cpu"))
interpreted = [
    pytest.mark.triton,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"triton cannot handle the CPU here: {WHY_NOT}"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORDERS = (0.5, 1.0, 2.0, 3.0, math.inf)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
over_orders = pytest.mark.parametrize("p", ORDERS)


def chunk_numel(dtype: torch.dtype) -> int:
    return memory.CHUNK_BYTES // dtype.itemsize


def at_offset(values: Tensor, offset: int) -> Tensor:
    """Return a copy that begins ``offset`` elements after an address that 64 divides."""
    buffer = torch.empty(values.numel() + offset + 64, dtype=values.dtype)
    begin = (-buffer.data_ptr() % 64) // values.element_size() + offset
    return buffer[begin : begin + values.numel()].copy_(values)


def borders(dtype: torch.dtype) -> list[Tensor]:
    """Return tensors that end at, before and after the ends of vectors, blocks, tiles and chunks."""
    chunk = chunk_numel(dtype)
    sizes = [1, 3, chunk // 32 + 1, chunk // 4 - 1, chunk // 4, chunk - 5, chunk, chunk + 1, 2 * chunk + 7]
    return [torch.randn(size).to(dtype) for size in sizes]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
