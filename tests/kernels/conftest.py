"""What the tests of the Triton kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


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
