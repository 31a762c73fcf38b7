"""Gradients are checked before the first one is touched, so a call that raises has changed nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_COMPLEX = frozenset((torch.complex32, torch.complex64, torch.complex128))
DTYPES = _COMPLEX | {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def check_readable(tensors: Sequence[Tensor], allows_sparse: bool = False) -> None:
    """Raise unless every tensor is strided (or sparse, where that is allowed) and of an allowed dtype."""
    # `<=` between a set and a frozenset is not traced by torch.compile of 2.7 and 2.8.
    if not {t.dtype for t in tensors} - DTYPES and (
        allows_sparse or not {t.layout for t in tensors} - {torch.strided}
    ):
        return
    for index, tensor in enumerate(tensors):
        where = _gradient(index, tensor)
        if tensor.layout is not torch.strided and not allows_sparse:
            raise TypeError(
                f"{where} has layout {tensor.layout}; only strided (dense) gradients can be clipped: "
                "call to_dense(), or build the embedding with sparse=False"
            )
        if tensor.dtype not in DTYPES:
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in DTYPES))
            raise TypeError(f"{where} has dtype {tensor.dtype}; allowed are {names}: convert it first")


def check_writable(tensors: Sequence[Tensor], allows_lazy: bool) -> None:
    """Raise unless every tensor may be written in place, each memory location once.

    Args:
        tensors: the gradients.
        allows_lazy: lazy conjugates and negatives can be handled, one tensor at a time.
    """
    irregular = list(tensors)
    if not torch.compiler.is_compiling():
        if not torch.is_inference_mode_enabled() and any(map(Tensor.is_inference, tensors)):
            index = next(i for i, t in enumerate(tensors) if t.is_inference())
            raise RuntimeError(
                f"{_gradient(index, tensors[index])} is an inference tensor, which cannot be changed "
                "outside of inference mode: clone() it first, or clip inside the mode"
            )
        if not allows_lazy and (any(map(Tensor.is_neg, tensors)) or any(map(Tensor.is_conj, tensors))):
            index = next(i for i, t in enumerate(tensors) if t.is_neg() or t.is_conj())
            raise RuntimeError(
                f"{_gradient(index, tensors[index])} is a lazy conjugate or negative view: call "
                "resolve_conj() or resolve_neg() on it first, or pass foreach=False"
            )
        if any(map(Tensor._is_zerotensor, tensors)):
            index = next(i for i, t in enumerate(tensors) if t._is_zerotensor())
            raise RuntimeError(
                f"{_gradient(index, tensors[index])} is a zero tensor without memory, which cannot be "
                "changed: clone() it first"
            )
        irregular = [t for t in tensors if t.layout is torch.strided and not t.is_contiguous()]
    for tensor in irregular:
        if tensor.numel() > 0 and _is_expanded(tensor):
            index = next(i for i, t in enumerate(tensors) if t is tensor)
            raise RuntimeError(
                f"{_gradient(index, tensor)} has strides {tensor.stride()}, so it is expanded: more than one "
                "element refers to a single memory location, and it cannot be clipped in place. clone() it "
                "first"
            )


def _is_expanded(tensor: Tensor) -> bool:
    # Of a gradient that is a view, torch.compile can read the strides only through another view.
    seen = tensor[...] if torch.compiler.is_compiling() else tensor
    return any(step == 0 and size > 1 for size, step in zip(seen.shape, seen.stride()))


def check_representable(dtypes: Iterable[torch.dtype], *bounds: float) -> None:
    """Raise if a finite bound does not fit one of the gradients' dtypes, or one is complex."""
    for dtype in dtypes:
        if dtype in _COMPLEX:
            raise RuntimeError(
                f"clamping is not defined for complex gradients, got {dtype}: leave these parameters out, or "
                "clamp torch.view_as_real(parameter.grad)"
            )
        limit = torch.finfo(dtype).max
        for bound in bounds:
            if limit < abs(bound) < math.inf:
                raise RuntimeError(
                    f"the bound {bound} cannot be represented in {dtype} without overflow "
                    f"(largest value {limit}): use a smaller bound, or inf for none"
                )


def is_flattened(parameter: Tensor) -> bool:
    """Tell whether FSDP1 has made a parameter part of a flat one, or it is such a flat one: a plain tensor
    that holds this rank's part of the values."""
    return getattr(parameter, "_fsdp_flattened", False)


def check_not_flattened(parameters: Iterable[Tensor]) -> None:
    """Raise if FSDP1 manages a parameter, for a norm to which nothing joins the other ranks."""
    if any(map(is_flattened, parameters)):
        raise RuntimeError(
            "FSDP1 manages these parameters, so each rank would clip by the norm of its own part: pass "
            "group=fsdp.process_group, or group=() with NO_SHARD, where each rank has all"
        )


def _gradient(index: int, tensor: Tensor) -> str:
    return f"gradient {index} (shape {tuple(tensor.shape)})"
