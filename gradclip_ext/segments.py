"""Segments: one value for each parameter of a call, beside one for each of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _extension


class Segments:
    """The parameters of a call in the order given, each once: T segments, some without a gradient.

    Args:
        parameters: the parameters as the caller gave them.
    """

    def __init__(self, parameters: list[Any]) -> None:
        self.parameters: list[Any] = listed_once(parameters)

    def check_one_each(self, name: str, value: Any) -> None:
        """Raise unless a tensor that is no scalar has one element for each of the parameters."""
        size = len(self.parameters)
        if isinstance(value, Tensor) and value.dim() != 0 and value.shape != (size,):
            number = "a number or " if name == "max_norm" else ""
            raise ValueError(
                f"{name} must be {number}a tensor with one element, or with one for each of the {size} "
                "parameters (a tied one counts once, one without gradient counts, too), got shape "
                f"{tuple(value.shape)}"
            )

    def of_gradients(self, values: Tensor, gradients: int) -> Tensor:
        """Return the values [T] of those that have a gradient, of which there are so many."""
        if gradients == len(self.parameters):
            return values
        return select(values, [i for i, p in enumerate(self.parameters) if p.grad is not None])

    def of_parameters(self, values: Tensor) -> Tensor:
        """Return values for all parameters, of shape [..., T]: those of the gradients, and 0 without one."""
        count = values.shape[-1]
        if count == len(self.parameters):
            return values
        indices = iter(range(count))
        return select(values, [None if p.grad is None else next(indices) for p in self.parameters])


def listed_once(parameters: list[Any]) -> list[Any]:
    """Return the list with each parameter once, in order: the list itself if that is so already."""
    if torch.compiler.is_compiling():  # it traces no id(), and a tensor's hash is its identity
        return list(dict.fromkeys(parameters))
    if _extension.C is not None and _extension.C.are_distinct(parameters):
        return parameters
    return list({id(p): p for p in parameters}.values())


def select(values: Tensor, indices: Sequence[int | None]) -> Tensor:
    """Return ``values[..., indices]``, with 0 for None.

    By slices, of which most lists need few: a tensor of indices would have to be copied to the device, and
    the host would wait for that.
    """
    pieces: list[Tensor] = []
    start = 0
    for end in range(1, len(indices) + 1):
        first, before = indices[start], indices[end - 1]
        after = indices[end] if end < len(indices) else None
        is_run = after is not None and before is not None and after == before + 1
        if end < len(indices) and (is_run or (before is None and after is None)):
            continue
        count = end - start
        zeros = (*values.shape[:-1], count)
        pieces.append(values.new_zeros(zeros) if first is None else values[..., first : first + count])
        start = end
    return torch.cat(pieces, dim=-1) if pieces else values[..., :0]


def positions_of(tensors: Sequence[Tensor], listed: Sequence[Tensor]) -> list[int]:
    """Return where in a list each of the tensors is first found, by identity."""
    if torch.compiler.is_compiling():  # it traces no id(), and a tensor's hash is its identity
        found = {t: i for i, t in reversed(list(enumerate(listed)))}
        return [found[t] for t in tensors]
    positions = {id(t): i for i, t in reversed(list(enumerate(listed)))}
    return [positions[id(t)] for t in tensors]
