"""The benchmarks' tests measure little, on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import machine, measure


@pytest.fixture(autouse=True)
def small_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Thousands of tensors, or enough copies to exceed a real cache, take seconds; small work that is
    shared among threads waits for other processes."""
    monkeypatch.setattr(measure, "HOST_COUNTS", (1, 300))
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(machine, "_BANDWIDTH_REPEATS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
