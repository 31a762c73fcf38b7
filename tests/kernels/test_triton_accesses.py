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
from gradclip_ext.norms import REPORT

pytestmark = interpreted


def norm_of(tensors: list[Tensor], p: float) -> float:
    return backend.norm(TensorList(tensors), p, REPORT, torch.float64)[0].item()


def scale_(tensors: list[Tensor], clip_coef: Tensor) -> None:
    backend.scale_(TensorList(tensors), clip_coef)


def clamp_(tensors: list[Tensor], low: float, high: float) -> None:
    backend.clamp_(TensorList(tensors), low, high)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the number of elements of every load of a tile."""
    from triton.runtime.interpreter import InterpreterBuilder  # noqa: PLC0415  (Triton may be absent)

    counts: list[int] = []
    load = InterpreterBuilder.create_masked_load

    def counted(self, ptrs, mask, *rest):  # type: ignore[no-untyped-def]
        if mask.data.ndim == 2:  # what is read of a table or of partials is not
            counts.append(int(mask.data.sum()))
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    yield counts


@over_dtypes
def test_a_chunk_is_read_again_only_if_its_sum_may_be_wrong(loaded: list[int], dtype: torch.dtype) -> None:
    numel = chunk_numel(dtype) - 3

    def reads(value: float, p: float) -> float:
        grad = torch.zeros(numel, dtype=dtype)
        grad[:4] = value
        loaded.clear()
        assert norm_of([grad], p) == pytest.approx(abs(value) * 4.0 ** (1.0 / p), rel=1e-6)
        return sum(loaded) / numel

    for p in (1.0, 2.0):
        assert reads(1.0, p) == 1
        # Squares of zeros, or squares that underflowed? Those of float16 do not.
        assert reads(0.0, p) == (1 if p == 1.0 or dtype == torch.float16 else 2)
    assert reads(0.0, 3.0) == reads(0.0, math.inf) == 1, "the largest magnitude says it all"
    for p in (1.0, 2.0):
        loaded.clear()
        assert math.isnan(norm_of([torch.full((numel,), math.nan, dtype=dtype)], p))
        assert sum(loaded) == numel
        loaded.clear()
        assert norm_of([torch.full((numel,), -math.inf, dtype=dtype)], p) == math.inf
        assert sum(loaded) == (1 if dtype == torch.float16 else 2) * numel
    tiny = torch.finfo(dtype).tiny
    assert reads(tiny, 2.0) == (1 if dtype == torch.float16 else 3)
    assert reads(torch.finfo(dtype).max, 2.0) == (1 if dtype == torch.float16 else 3)


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
