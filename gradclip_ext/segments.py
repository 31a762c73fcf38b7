"""Segments: one value for each parameter of a call, beside one for each of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _extension

# So many slices take as long as indices.
_MOST_SLICES = 8


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

    By slices, of which most lists need few. Where they would be many, by tensors of indices: from page-locked
    memory, so that the host does not wait for their copy. A captured graph would read that memory again.
    """
    runs: list[tuple[int | None, int]] = []  # the first index, None for zeros, and the length
    start = 0
    for end in range(1, len(indices) + 1):
        first, before = indices[start], indices[end - 1]
        after = indices[end] if end < len(indices) else None
        is_run = after is not None and before is not None and after == before + 1
        if end < len(indices) and (is_run or (before is None and after is None)):
            continue
        runs.append((first, end - start))
        start = end
    if len(runs) > _MOST_SLICES and _can_copy_indices_to(values.device):
        found = values.new_zeros((*values.shape[:-1], len(indices)))
        where = _as_index([i for i, index in enumerate(indices) if index is not None], values.device)
        which = _as_index([index for index in indices if index is not None], values.device)
        return found.index_copy_(-1, where, values.index_select(-1, which))
    pieces = [
        values.new_zeros((*values.shape[:-1], count)) if first is None else values[..., first : first + count]
        for first, count in runs
    ]
    return torch.cat(pieces, dim=-1) if pieces else values[..., :0]


def _can_copy_indices_to(device: torch.device) -> bool:
    if torch.compiler.is_compiling():
        return False
    return device.type == "cpu" or (device.type == "cuda" and not torch.cuda.is_current_stream_capturing())


def _as_index(indices: list[int], device: torch.device) -> Tensor:
    index = torch.tensor(indices, dtype=torch.int64, device="cpu")
    return index if device.type == "cpu" else index.pin_memory().to(device, non_blocking=True)


def positions_of(tensors: Sequence[Tensor], listed: Sequence[Tensor]) -> list[int]:
    """Return where in a list each of the tensors is first found, by identity."""
    if torch.compiler.is_compiling():  # it traces no id(), and a tensor's hash is its identity
        found = {t: i for i, t in reversed(list(enumerate(listed)))}
        return [found[t] for t in tensors]
    positions = {id(t): i for i, t in reversed(list(enumerate(listed)))}
    return [positions[id(t)] for t in tensors]
