"""Thresholds with short memories, and sequences of norms that they follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gradclip_ext.thresholds import AdaGC, AutoClip, SpikeDetector, ZClip

NAN, INF = math.nan, math.inf
PARAMETERS = 3

# A short warm-up or window, so that a sequence leaves it.
RULES: dict[str, Callable[[], Any]] = {
    "ZClip": lambda: ZClip(warmup_steps=7),
    "AutoClip": lambda: AutoClip(window=11),
    "AdaGC": lambda: AdaGC([torch.zeros(1) for _ in range(PARAMETERS)], warmup_steps=7),
    "SpikeDetector": lambda: SpikeDetector(window=12),
}
over_rules = pytest.mark.parametrize("name", RULES)


def sequence(
    count: int,
    *shape: int,
    nonfinite: bool = True,
    spikes: float = 0.125,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return norms that drift and vary, some of them up to 1000 times as large, one in eight not finite."""
    drift = torch.randn(count, *shape).cumsum(0).mul(0.05).exp()
    norms = drift * torch.randn(count, *shape).mul(0.2).exp()
    high = norms * 10 ** torch.empty_like(norms).uniform_(0.0, 3.0)
    norms = torch.where(torch.rand(norms.shape) < spikes, high, norms)
    if nonfinite:
        kind = torch.randint(0, 16, norms.shape)
        norms = torch.where(kind == 0, torch.full_like(norms, NAN), norms)
        norms = torch.where(kind == 1, torch.full_like(norms, INF), norms)
    return norms.to(dtype)


def norms_for(name: str, count: int, **options: Any) -> Tensor:
    return sequence(count, *((PARAMETERS,) if name == "AdaGC" else ()), **options)


def run(rule: Any, norms: Sequence[Tensor] | Tensor) -> list[Tensor]:
    return [rule(norm) for norm in norms]


def assert_same_results(one: list[Tensor], other: list[Tensor], what: str = "") -> None:
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{what}: call {index}: {a} beside {b}"


def assert_same_states(one: Any, other: Any, what: str = "") -> None:
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{what}: {name}: {a} beside {b}"
