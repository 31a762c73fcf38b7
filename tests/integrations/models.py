"""A small model, its data, and what torch's own clipping makes of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_NORM = 0.05
STEPS = 4


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def data(rows: int = 4 * STEPS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 4, generator=generator)


def assert_same_weights(one: nn.Module, other: nn.Module, atol: float = 1e-6) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_other_weights(one: nn.Module, other: nn.Module) -> None:
    """Fail where a comparison of weights could not tell whether gradients were clipped."""
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(one.parameters(), other.parameters(), strict=True))
