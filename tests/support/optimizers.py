"""Optimizers the tests share, twins of them, and comparisons of what they leave behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import oracle
import torch
from cases import random
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

# The seven fused ones: every kind of state that a step keeps.
FUSED: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "Adam": (Adam, {"lr": 0.1}),
    "Adam amsgrad": (Adam, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}),
    "AdamW": (AdamW, {"lr": 0.1}),
    "SGD": (SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "SGD momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "SGD nesterov": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "Adagrad": (Adagrad, {"lr": 0.1}),
}
SHAPES = ((5, 3), (4,), (), (7,))
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(random(*s, dtype=d)) for s, d in zip(SHAPES, DTYPES)]


def twins(make: Callable[[list[Any]], Optimizer]) -> tuple[Optimizer, Optimizer]:
    """Return two optimizers of the same parameters, each with copies of its own."""
    first = weights()
    return make(first), make([torch.nn.Parameter(p.detach().clone()) for p in first])


def fused(name: str) -> Callable[[list[Any]], Optimizer]:
    kind, options = FUSED[name]
    return lambda params: kind(params, fused=True, **options)


def params_of(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def random_grads() -> list[Tensor]:
    """Return a gradient for each of the weights; both zeros are among the values."""
    grads = [random(*s, dtype=d) for s, d in zip(SHAPES, DTYPES)]
    grads[0][0, :2] = torch.tensor([0.0, -0.0])
    return grads


def deliver(grads: Sequence[Tensor], *optimizers: Optimizer, scale: float = 1.0) -> None:
    """Give each optimizer copies of the gradients."""
    for optimizer in optimizers:
        for param, grad in zip(params_of(optimizer), grads, strict=True):
            param.grad = grad * scale if scale != 1.0 else grad.clone()


def assert_same_training(one: Optimizer, other: Optimizer, what: str = "") -> None:
    """Assert that parameters and state have the same bits. State that only one has counts as zeros."""
    for index, (a, b) in enumerate(zip(params_of(one), params_of(other), strict=True)):
        oracle.assert_same_bits(a, b, f"{what}: parameter {index}")
        here, there = one.state.get(a, {}), other.state.get(b, {})
        for name in {*here, *there}:
            if name in here and name in there:
                oracle.assert_same_bits(here[name], there[name], f"{what}: {name} of {index}")
            else:
                assert not (here.get(name, there.get(name)) != 0).any(), f"{what}: {name} of {index}"
