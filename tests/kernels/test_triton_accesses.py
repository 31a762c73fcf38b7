"""What the Triton kernels load and store, in the interpreter; test_triton_interpreted.py runs this file."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton_inputs import at_offset, backend, borders, chunk_numel, clones, interpreted, over_dtypes, same

from gradclip_ext.backends.base import TensorList

pytestmark = interpreted


def scale_(tensors: list[Tensor], clip_coef: Tensor) -> None:
    backend.scale_(TensorList(tensors), clip_coef)


def clamp_(tensors: list[Tensor], low: float, high: float) -> None:
    backend.clamp_(TensorList(tensors), low, high)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the number of elements of every store."""
    from triton.runtime.interpreter import InterpreterBuilder  # noqa: PLC0415  (Triton may be absent)

    counts: list[int] = []
    store = InterpreterBuilder.create_masked_store

    def counted(self, ptrs, value, mask, *rest):  # type: ignore[no-untyped-def]
        counts.append(int(mask.data.sum()))
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted)
    yield counts


@pytest.mark.parametrize("coef", [1.0, 1.5, math.inf])
def test_scale_stores_nothing_where_nothing_is_clipped(stored: list[int], coef: float) -> None:
    grads = borders(torch.float32)
    before = clones(grads)
    scale_(grads, torch.tensor(coef))
    assert stored == [] and all(same(a, b) for a, b in zip(grads, before))


def test_read_only_memory_is_left_alone() -> None:
    """Pages that cannot be written: a store of unchanged values would kill the process."""
    with pytest.warns(UserWarning, match="not writable"):
        grad = torch.frombuffer(mmap.mmap(-1, 4 * 20_000, prot=mmap.PROT_READ), dtype=torch.float32)
    scale_([grad], torch.tensor(1.0))
    clamp_([grad], -1.0, 1.0)


@over_dtypes
def test_clamp_stores_only_what_changes(stored: list[int], dtype: torch.dtype) -> None:
    vec = 16 // dtype.itemsize
    grad = at_offset(torch.zeros(chunk_numel(dtype) + 2 * vec + 1, dtype=dtype), 0)
    grad[[3, 5 * vec, -vec - 2, -1]] = 2.0
    clamp_([grad], -1.0, 1.0)
    assert sum(stored) == 3 * vec + 1, "two vectors of whole tiles, one of the last, one element after it"
    stored.clear()
    clamp_([grad], -1.0, 1.0)
    assert sum(stored) == 0
