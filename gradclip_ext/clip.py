"""The public clipping functions: check the arguments, read the gradients, norm, coefficient, apply."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _torch_functions, arguments
from gradclip_ext.backends import Selection
from gradclip_ext.gradients import check_representable, is_dispatch_subclass, read_gradients, read_tensors
from gradclip_ext.interception import is_intercepted
from gradclip_ext.norms import Rule, raise_if_nonfinite

Tensors = Tensor | Iterable[Tensor]


def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Scale gradients in place so that their joint norm is at most ``max_norm``; return the norm from before.

    The returned norm is the one **before** clipping, so it may exceed ``max_norm``: that is
    how often clipping acts. Equivalent to :func:`torch.nn.utils.clip_grad_norm_`, with the
    norm accumulated and returned in float32 (float64 as soon as one gradient is) and no
    write at all where the host can see that nothing needs clipping.

    All gradients are multiplied by ``min(1, max_norm / (total_norm + 1e-6))``, where
    ``total_norm`` is the norm of all of them laid out as one vector.

    Args:
        parameters: a tensor or an iterable of tensors whose ``.grad`` is clipped; those
            without a gradient are skipped, one listed twice counts once. An exhausted
            generator warns.
        max_norm: largest allowed norm, 0 or more. ``inf`` only reports the norm.
        norm_type: order p of the norm: any number, ``inf`` for the largest magnitude,
            0 for the number of tensors with a nonzero element.
        error_if_nonfinite: raise instead of clipping when the norm is NaN or infinite.
        foreach: None or True lets a whole list be handled at once, False takes one tensor
            at a time; meaning and errors are torch's.
        backend: name of the backend to insist on, or None to choose by device. A gradient
            with gaps in memory or of complex dtype is handled by ``"foreach"`` whichever
            backend is named.

    Returns:
        A new 0-d tensor on the device of the first gradient, float32 or float64. With no
        gradient at all, ``torch.tensor(0.0)``.

    Raises:
        TypeError: parameters is a module, or an element or gradient is of the wrong kind
            (not a tensor, sparse, integer, float8).
        ValueError: max_norm is negative or NaN, or the backend does not exist.
        RuntimeError: error_if_nonfinite is set and the norm is NaN or infinite (the message
            names the first tensor that is to blame); a gradient is expanded; foreach=True on
            a device without foreach support. No exception changes any gradient.

    Note:
        Does not synchronise with an accelerator unless error_if_nonfinite is set; runs on
        the current stream. A NaN gives a NaN norm and NaN gradients, an infinity gives norm
        inf and finite gradients become 0, as in torch; with ``max_norm=inf`` nothing is
        scaled. DTensors and other tensor subclasses go to torch's function unchanged.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])

    References:
        Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural
        networks", ICML 2013, algorithm 1.
    """
    listed = arguments.as_list("parameters", parameters)
    rule = Rule(arguments.as_threshold("max_norm", max_norm), bool(error_if_nonfinite))
    norm_type = arguments.as_float("norm_type", norm_type)
    with torch.no_grad():
        gradients = read_gradients(listed, Selection(backend, foreach, is_intercepted()))
        if gradients is None:
            return _torch_functions.clip_grad_norm_(
                listed, rule.max_norm, norm_type, error_if_nonfinite, foreach
            )
        if not gradients.tensors:
            return torch.tensor(0.0)
        total_norm, clip_coef = gradients.norm(norm_type, rule)
        if rule.error_if_nonfinite:
            # Read again only to name a tensor: asking what is no leaf for .grad makes torch warn.
            raise_if_nonfinite(total_norm, norm_type, (p.grad for p in listed))
        gradients.scale_(clip_coef)
        return total_norm


def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Return the norm of all tensors laid out as one vector.

    Takes the tensors themselves (gradients, weights, activations), not parameters, and
    only reads them. Equivalent to :func:`torch.nn.utils.get_total_norm`; arguments, result,
    errors and synchronisation as in :func:`clip_grad_norm_`. Expanded tensors are welcome.

    Example:
        >>> get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    listed = arguments.as_list("tensors", tensors)
    rule = Rule(math.inf, bool(error_if_nonfinite))
    norm_type = arguments.as_float("norm_type", norm_type)
    with torch.no_grad():
        given = read_tensors(listed, Selection(backend, foreach, is_intercepted()))
        if given is None:
            return _torch_functions.get_total_norm(listed, norm_type, error_if_nonfinite, foreach)
        if not given.tensors:
            return torch.tensor(0.0)
        total_norm, _ = given.norm(norm_type, rule)
        if rule.error_if_nonfinite:
            raise_if_nonfinite(total_norm, norm_type, listed)
        return total_norm


def clip_grads_with_norm_(
    parameters: Tensors,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Scale gradients in place by ``min(1, max_norm / (total_norm + 1e-6))``.

    The second half of :func:`clip_grad_norm_`, for a norm that was computed elsewhere, for
    instance across pipeline stages. Equivalent to
    :func:`torch.nn.utils.clip_grads_with_norm_`.

    Args:
        parameters: as in :func:`clip_grad_norm_`.
        max_norm: largest allowed norm, 0 or more; ``inf`` scales nothing.
        total_norm: real 0-d tensor on any device; half types and integers become float32 first.
        foreach: as in :func:`clip_grad_norm_`.
        backend: as in :func:`clip_grad_norm_`.

    Raises:
        TypeError: total_norm is not a real tensor; otherwise as :func:`clip_grad_norm_`.
        ValueError: total_norm is not 0-d; otherwise as :func:`clip_grad_norm_`.

    Note:
        Synchronises only to bring a total_norm from an accelerator to gradients on the CPU.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grads_with_norm_([weight], max_norm=1.0, total_norm=torch.tensor(10.0))
        >>> weight.grad
        tensor([0.3000, 0.4000])
    """
    listed = arguments.as_list("parameters", parameters)
    rule = Rule(arguments.as_threshold("max_norm", max_norm))
    total_norm = arguments.as_total_norm(total_norm)
    with torch.no_grad():
        selection = Selection(backend, foreach, is_intercepted())
        gradients = read_gradients(listed, selection, allows_sparse=True)
        if gradients is None or is_dispatch_subclass(total_norm):
            _torch_functions.clip_grads_with_norm_(listed, rule.max_norm, total_norm, foreach)
        elif gradients.tensors:
            gradients.scale_(rule.clip_coef(total_norm))


def clip_grad_value_(
    parameters: Tensors,
    clip_value: float,
    foreach: bool | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Clamp every gradient element in place to ``[-clip_value, clip_value]``.

    Equivalent to :func:`torch.nn.utils.clip_grad_value_`, in one pass instead of two where
    the device allows it.

    Args:
        parameters: as in :func:`clip_grad_norm_`; with no gradient nothing happens.
        clip_value: largest allowed magnitude, 0 or more.
        foreach: as in :func:`clip_grad_norm_`.
        backend: as in :func:`clip_grad_norm_`.

    Raises:
        TypeError: as :func:`clip_grad_norm_`.
        ValueError: clip_value is negative or NaN.
        RuntimeError: clip_value is finite but beyond the range of a gradient's dtype, or a
            gradient is complex or expanded. No exception changes any gradient.

    Note:
        Never synchronises. NaN stays NaN, infinities become the bound.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> weight.grad = torch.tensor([-2.0, 0.5, 3.0])
        >>> clip_grad_value_([weight], 1.0)
        >>> weight.grad
        tensor([-1.0000,  0.5000,  1.0000])
    """
    listed = arguments.as_list("parameters", parameters)
    clip_value = arguments.as_threshold("clip_value", clip_value)
    with torch.no_grad():
        if not _clamp_(listed, -clip_value, clip_value, Selection(backend, foreach, is_intercepted())):
            _torch_functions.clip_grad_value_(listed, clip_value, foreach)


def clamp_grad_(
    parameters: Tensors,
    min: float | None = None,
    max: float | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Clamp every gradient element in place to ``[min, max]``; the bounds need not be symmetric.

    Equivalent to ``p.grad.clamp_(min, max)`` for every parameter that has a gradient.

    Args:
        parameters: as in :func:`clip_grad_norm_`; with no gradient nothing happens.
        min: lower bound, or None for none.
        max: upper bound, or None for none.
        backend: as in :func:`clip_grad_norm_`.

    Raises:
        TypeError: as :func:`clip_grad_norm_`.
        ValueError: both bounds are None, one is NaN, or min exceeds max.
        RuntimeError: a finite bound is beyond the range of a gradient's dtype, or a gradient
            is complex or expanded. No exception changes any gradient.

    Note:
        Never synchronises. NaN stays NaN, infinities become the bound on their side.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> weight.grad = torch.tensor([-2.0, 0.5, 3.0])
        >>> clamp_grad_([weight], min=-0.1, max=1.0)
        >>> weight.grad
        tensor([-0.1000,  0.5000,  1.0000])
    """
    listed = arguments.as_list("parameters", parameters)
    low, high = arguments.as_bounds(min, max)
    with torch.no_grad():
        if not _clamp_(listed, low, high, Selection(backend, None, is_intercepted())):
            for parameter in listed:
                if parameter.grad is not None:
                    parameter.grad.clamp_(low, high)


def _clamp_(parameters: list[Any], low: float, high: float, selection: Selection) -> bool:
    """Clamp the gradients, or return False for a list that belongs to torch's own functions."""
    gradients = read_gradients(parameters, selection, needs_sign=low != -high)
    if gradients is None:
        return False
    if gradients.tensors:
        check_representable(gradients.dtypes(), low, high)
        gradients.clamp_(low, high)
    return True
