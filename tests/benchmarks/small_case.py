"""A case that takes milliseconds, and how to measure it."""

from __future__ import annotations

import torch

from benchmarks import measure
from benchmarks.cases import Case
from benchmarks.contenders import Implementation, available
from benchmarks.machine import Bandwidths
from benchmarks.measure import Settings
from benchmarks.operations import OPERATIONS, Operation
from benchmarks.results import Record

CPU = torch.device("cpu")
SMALL = Case("small", "made up for the tests", ((300, 70), (128,), (7, 5)))
SETTINGS = Settings(CPU, lambda: Bandwidths(10.0, 20.0), repeats=3, seconds=0.0)


def measured(
    dtype: str, extra: Implementation | None = None, operations: tuple[Operation, ...] = OPERATIONS
) -> list[list[Record]]:
    """Return the records of what is available here, and of one more implementation."""
    implementations = [*available(CPU)[0].values(), *([extra] if extra else [])]
    return list(measure.measure_case(SMALL, dtype, operations, implementations, SETTINGS))
