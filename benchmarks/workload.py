"""The gradients one case is measured on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.operations import GRADIENT_STD
from benchmarks.shapes import Case
from gradclip_ext import reference

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIXED = "mixed"
DTYPES = (*_DTYPES, MIXED)

# Calls see memory that has left the cache once this many times its size has gone through since.
_CACHES = 3
# Making a tensor costs the host microseconds and a kilobyte: lists of thousands get fewer copies.
_MOST_TENSORS = 16_384
# What the gate, a sweep and an implementation may need beyond the gradients.
_SCRATCH_BYTES = 512 << 20
# Elements looked at in float64 at a time. On a CPU: what one thread does alone, because waiting for
# another one thousands of times takes minutes on a busy machine, and small enough for malloc to keep
# it for the next chunk, where larger pieces go back to the system and cost a page fault every 4 KiB.
_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 24}


class Workload:
    """Random gradients in one dtype: their pristine values, and copies that take turns.

    Every gradient is an allocation of its own, as autograd makes them. A call gets the copy
    that was used longest ago; where all copies together are too small to push each other out
    of the cache, :meth:`cool` does it. :meth:`restore` undoes a call. All of that happens
    outside the timed region.

    Args:
        case: the shapes.
        dtype: one of DTYPES.
        device: where the gradients live.
        cache_bytes: size of the cache that the gradients have to have left, see machine.cache_bytes.
        seed: of the random values.
    """

    def __init__(self, case: Case, dtype: str, device: torch.device, cache_bytes: int, seed: int = 0) -> None:
        self.case = case
        self.device = device
        self.dtype = dtype
        self.bytes = gradient_bytes(case, dtype)
        copies = _copies(case, self.bytes, cache_bytes)
        random = torch.Generator(device).manual_seed(seed)
        self.pristine = [
            torch.empty(shape, dtype=tensor_dtype, device=device).normal_(0.0, GRADIENT_STD, generator=random)
            for shape, tensor_dtype in zip(case.shapes, dtypes_of(case, dtype))
        ]
        self._copies = [[_parameter(t) for t in self.pristine] for _ in range(copies)]
        self._turn = 0
        too_small = copies * self.bytes < _CACHES * cache_bytes
        self._sweep = torch.zeros(_CACHES * cache_bytes // 4, device=device) if too_small else None
        self.norm = reference.total_norm([torch.tensor(list(self._chunk_norms()), dtype=torch.float64)])

    def next(self) -> list[Parameter]:
        """Return the parameters whose gradients were used longest ago."""
        self._turn = (self._turn + 1) % len(self._copies)
        return self._copies[self._turn]

    def restore(self, parameters: Sequence[Parameter]) -> None:
        """Give the gradients of ``parameters`` their pristine values back."""
        for parameter, values in zip(parameters, self.pristine):
            if parameter.grad is None:  # an implementation under judgement may do anything
                parameter.grad = torch.empty_like(values)
        # All at once: one by one, thousands of copies would be most of a GPU's run.
        torch._foreach_copy_([p.grad for p in parameters if p.grad is not None], self.pristine)

    def cool(self) -> None:
        """Push the gradients out of the cache unless the other copies have done so already."""
        if self._sweep is not None:
            self._sweep.sum()

    def _chunk_norms(self) -> Iterator[float]:
        for tensor in self.pristine:
            for chunk in chunks(tensor):
                yield reference.total_norm([chunk])


def dtypes_of(case: Case, dtype: str) -> list[torch.dtype]:
    """Return the dtype of every tensor.

    ``mixed`` is what training in bfloat16 with norms kept in float32 leaves: vectors are
    float32, the rest is bfloat16. Where that gives one dtype, every other tensor is float32.
    """
    if dtype != MIXED:
        return [_DTYPES[dtype]] * case.tensors
    wide = [len(shape) == 1 for shape in case.shapes]
    if len(set(wide)) == 1:
        wide = [index % 2 == 1 for index in range(case.tensors)]
    return [torch.float32 if is_wide else torch.bfloat16 for is_wide in wide]


def gradient_bytes(case: Case, dtype: str) -> int:
    """Return the size of all gradients together."""
    dtypes = dtypes_of(case, dtype)
    return sum(math.prod(shape) * kind.itemsize for shape, kind in zip(case.shapes, dtypes))


def obstacle(case: Case, dtype: str, cache_bytes: int, free_bytes: int | None) -> str | None:
    """Return why the case cannot be measured in this dtype, or None if it can."""
    if dtype == MIXED and case.tensors == 1:
        return "a single tensor has a single dtype"
    size = gradient_bytes(case, dtype)
    needed = (_copies(case, size, cache_bytes) + 1) * size + _CACHES * cache_bytes + _SCRATCH_BYTES
    if free_bytes is not None and needed > free_bytes:
        return f"it needs {needed / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are free"
    return None


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield flat pieces small enough to be looked at in float64 whatever the tensor's size."""
    yield from tensor.view(-1).split(_CHUNK[tensor.device.type])


def _copies(case: Case, size: int, cache_bytes: int) -> int:
    enough = -(-_CACHES * cache_bytes // size)
    return max(1, min(enough, _MOST_TENSORS // case.tensors))


def _parameter(values: Tensor) -> Parameter:
    # Clipping never looks at the weights, so one element stands for all of them.
    parameter = Parameter(values.new_zeros(()).expand(values.shape))
    parameter.grad = values.clone()
    return parameter
