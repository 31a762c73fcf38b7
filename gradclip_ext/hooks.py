"""Clamping from inside backward, before the gradient is accumulated."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gradclip_ext import arguments, calls
from gradclip_ext.checks import check_representable, is_flattened

_SPARSE_LAYOUTS = frozenset(
    (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
)


class ClampHandle:
    """The hooks of one :func:`register_clamp_hook` call; also a context manager that removes them.

    A copy, by pickle or ``copy.deepcopy``, has no hooks: those of torch stay with the original tensors.
    """

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def __reduce__(self) -> tuple[type[ClampHandle], tuple[list[RemovableHandle]]]:
        # torch's handles would copy all hooks of their tensors, and fail where another one is a lambda.
        return type(self), ([],)

    def __len__(self) -> int:
        """Return how many tensors are being clamped."""
        return len(self._handles)

    def remove(self) -> None:
        """Remove every hook; calling it again does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> ClampHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


@calls.profiled
def register_clamp_hook(
    parameters_or_module: Tensor | Iterable[Tensor] | torch.nn.Module,
    min: float | None = None,
    max: float | None = None,
) -> ClampHandle:
    """Clamp gradients to ``[min, max]`` during backward, as they reach each parameter.

    Equivalent to ``p.register_hook(lambda g: torch.clamp(g, min, max))`` for every parameter
    ``p``, with three additions: the bounds are checked once, here, instead of failing in the
    middle of backward; frozen parameters are skipped where ``register_hook`` raises; and one
    handle removes all hooks.

    Each backward pass is clamped before it is added to ``.grad``: under gradient
    accumulation the parts are clamped, not their sum (:func:`clamp_grad_` clamps the sum).
    A tied weight sees one call per backward, with the sum over its uses. The incoming
    gradient is never written to, because autograd may have handed the same buffer to
    another input.

    Args:
        parameters_or_module: tensors to clamp, or a module for all of its parameters. Any
            tensor that requires grad will do, activations included; others are skipped.
            One listed twice gets one hook.
        min: lower bound, or None for none.
        max: upper bound, or None for none.

    Returns:
        A handle: ``remove()`` takes every hook off again, ``len()`` counts them, and it
        works in a ``with`` statement.

    Raises:
        TypeError: an element is not a tensor.
        ValueError: both bounds are None, one is NaN, or min exceeds max.
        RuntimeError: a finite bound is beyond the range of a parameter's dtype, a parameter
            is complex, or FSDP manages the parameters, whose hooks then never run.
            No exception leaves a hook behind. Inside backward: a gradient is sparse, and 0 is not between
            the bounds or it has another layout than COO.

    Note:
        Never synchronises; one read and one write of each gradient on the stream of its
        backward. Differentiable, so it also works with ``create_graph=True``. NaN stays NaN.
        Of a sparse gradient (COO) the sum of what falls on one element is clamped, and it stays sparse.
        Hooks are on these tensors, as all of torch's are: not on those of a ``copy.deepcopy``,
        nor on those that ``load_state_dict(assign=True)`` or FSDP put in their place
        afterwards, and a parameter that is frozen now and not later has none.

        A hook sees what backward computes: under DDP each rank's gradient before they are
        averaged, under a ``GradScaler`` the scaled one. :func:`clamp_grad_` after backward (and
        ``unscale_``) clamps what the optimizer gets, under FSDP too. Parameters of
        ``fully_shard`` given as a list look like any DTensors and are not recognised.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> handle = register_clamp_hook([weight], min=-0.5, max=2.0)
        >>> (weight * torch.tensor([-3.0, 1.0, 5.0])).sum().backward()
        >>> weight.grad
        tensor([-0.5000,  1.0000,  2.0000])
        >>> handle.remove()
    """
    low, high = arguments.as_bounds(min, max)
    if isinstance(parameters_or_module, torch.nn.Module):
        _check_not_sharded(parameters_or_module)
        parameters_or_module = parameters_or_module.parameters()
    name = "parameters_or_module"
    listed: list[Any] = arguments.as_list(name, parameters_or_module)
    tensors = [t for t in arguments.all_tensors(name, listed) if t.requires_grad]
    _check_hooks_run(tensors)
    check_representable({_grad_dtype(t) for t in tensors}, low, high)
    # No local function: it could not be pickled, and whoever pickles a handle of torch's pickles all hooks.
    clamp = functools.partial(_clamp, low=low, high=high)
    hooks: list[RemovableHandle] = []
    handle = ClampHandle(hooks)
    try:
        for tensor in {id(t): t for t in tensors}.values():
            hooks.append(tensor.register_hook(clamp))
    except Exception:  # of a lazy module's parameter, for one
        handle.remove()
        raise
    return handle


def _clamp(grad: Tensor, low: float, high: float) -> Tensor:
    if grad.layout not in _SPARSE_LAYOUTS:
        return torch.clamp(grad, low, high)
    if grad.layout is not torch.sparse_coo or not low <= 0.0 <= high:
        raise RuntimeError(
            f"a gradient of shape {tuple(grad.shape)} has layout {grad.layout}, which cannot be clamped to "
            f"[{low}, {high}]: build the embedding with sparse=False, or call to_dense() in a hook of your "
            "own before this one (a COO gradient can stay sparse between bounds that include 0)"
        )
    whole = grad.coalesce()
    values = torch.clamp(whole.values(), low, high)
    return torch.sparse_coo_tensor(
        whole.indices(), values, whole.shape, is_coalesced=True, check_invariants=False
    )


def _grad_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a tensor's gradient; only leaves (torch >= 2.10) have one of their own."""
    return (tensor.is_leaf and getattr(tensor, "grad_dtype", None)) or tensor.dtype


def _check_not_sharded(module: torch.nn.Module) -> None:
    """Refuse a module of ``fully_shard``'s: it gathers its parameters into other tensors for every pass."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has such a module has imported it
    if fsdp and any(isinstance(m, fsdp.FSDPModule) for m in module.modules()):
        _raise_hooks_never_run(f"{type(module).__name__} is or holds a module of FSDP's fully_shard")


def _check_hooks_run(tensors: Sequence[Tensor]) -> None:
    """Refuse parameters that FSDP has made views of a flat one, which is the one that gets a gradient."""
    for tensor in tensors:
        if is_flattened(tensor) and not hasattr(tensor, "_is_flat_param"):
            _raise_hooks_never_run(f"a parameter of shape {tuple(tensor.shape)} is part of FSDP's flat one")


def _raise_hooks_never_run(why: str) -> NoReturn:
    raise RuntimeError(
        f"{why}, so hooks on its parameters would never run: call clamp_grad_(parameters, min, max) after "
        "backward"
    )
