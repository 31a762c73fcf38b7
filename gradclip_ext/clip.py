"""The public clipping functions: arguments and gradients are checked here, backends do the work."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# torch's own functions, kept from before patch_torch() could replace them: a tensor subclass
# goes to these, and looking them up at call time would come back here.
from torch.nn.utils import clip_grad_norm_ as _torch_clip_grad_norm_
from torch.nn.utils import clip_grad_value_ as _torch_clip_grad_value_
from torch.nn.utils import clip_grads_with_norm_ as _torch_clip_grads_with_norm_
from torch.nn.utils import get_total_norm as _torch_get_total_norm

from gradclip_ext import backends, checks
from gradclip_ext.backends import Backend
from gradclip_ext.backends.foreach import clip_coef
from gradclip_ext.tracing import operations_are_followed

Tensors = Tensor | Iterable[Tensor]
Serving = dict[torch.device, Backend]
_IS_CPU = operator.attrgetter("is_cpu")
_WIDE = (torch.float64, torch.complex128)


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
            with gaps in memory or of complex dtype is served by ``"foreach"`` whichever
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
    listed = checks.as_list("parameters", parameters)
    max_norm = checks.as_threshold("max_norm", max_norm)
    norm_type = checks.as_float("norm_type", norm_type)
    for fused in backends.fused(backend, foreach):
        served = fused.clip_grad_norm_(listed, max_norm, norm_type, bool(error_if_nonfinite))
        if served is not None:
            norm, refused = served
            if refused:
                _raise_if_nonfinite(norm, norm_type, [p.grad for p in listed])
            return norm
    with torch.no_grad():
        grads = checks.gradients(listed)
        serving = backends.choose(backend, foreach, _devices(grads))
        if not grads:
            return torch.tensor(0.0)
        if checks.has_dispatch_subclass(grads):
            return _torch_clip_grad_norm_(listed, max_norm, norm_type, error_if_nonfinite, foreach)
        dtypes = checks.readable(grads)
        checks.writable(grads)
        plain = checks.unique(checks.as_plain(grads))
        if not error_if_nonfinite:
            clipped = _clip_norm_(serving, plain, max_norm, norm_type)
            if clipped is not None:
                return clipped
        norm = _total_norm(serving, plain, dtypes, norm_type)
        if error_if_nonfinite:
            _raise_if_nonfinite(norm, norm_type, [p.grad for p in listed])
        _scale_(serving, plain, max_norm, norm)
        return norm


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
    listed = checks.as_list("tensors", tensors)
    norm_type = checks.as_float("norm_type", norm_type)
    for fused in backends.fused(backend, foreach):
        norm = fused.get_total_norm(listed, norm_type)
        if norm is not None:
            if error_if_nonfinite:
                _raise_if_nonfinite(norm, norm_type, listed)
            return norm
    with torch.no_grad():
        given = checks.all_tensors("tensors", listed)
        serving = backends.choose(backend, foreach, _devices(given))
        if not given:
            return torch.tensor(0.0)
        if checks.has_dispatch_subclass(given):
            return _torch_get_total_norm(given, norm_type, error_if_nonfinite, foreach)
        dtypes = checks.readable(given)
        norm = _total_norm(serving, checks.unique(checks.as_plain(given)), dtypes, norm_type)
        if error_if_nonfinite:
            _raise_if_nonfinite(norm, norm_type, given)
        return norm


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
    listed = checks.as_list("parameters", parameters)
    max_norm = checks.as_threshold("max_norm", max_norm)
    checks.total_norm(total_norm)
    for fused in backends.fused(backend, foreach):
        if fused.clip_grads_with_norm_(listed, max_norm, total_norm):
            return
    with torch.no_grad():
        grads = checks.gradients(listed)
        serving = backends.choose(backend, foreach, _devices(grads))
        if not grads:
            return
        if checks.has_dispatch_subclass([*grads, total_norm]):
            _torch_clip_grads_with_norm_(listed, max_norm, total_norm, foreach)
            return
        checks.readable(grads)
        checks.writable(grads)
        (norm,) = checks.as_plain([total_norm])
        _scale_(serving, checks.unique(checks.as_plain(grads)), max_norm, norm)


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
    listed = checks.as_list("parameters", parameters)
    clip_value = checks.as_threshold("clip_value", clip_value)
    for fused in backends.fused(backend, foreach):
        if fused.clamp_grad_(listed, -clip_value, clip_value):
            return
    with torch.no_grad():
        grads = checks.gradients(listed)
        serving = backends.choose(backend, foreach, _devices(grads))
        if checks.has_dispatch_subclass(grads):
            _torch_clip_grad_value_(listed, clip_value, foreach)
            return
        _clamp_(serving, grads, -clip_value, clip_value)


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
    listed = checks.as_list("parameters", parameters)
    low, high = checks.as_bounds(min, max)
    for fused in backends.fused(backend, None):
        if fused.clamp_grad_(listed, low, high):
            return
    with torch.no_grad():
        grads = checks.gradients(listed)
        serving = backends.choose(backend, None, _devices(grads))
        if checks.has_dispatch_subclass(grads):
            for grad in grads:
                grad.clamp_(low, high)
            return
        _clamp_(serving, grads, low, high)


def _clip_norm_(
    serving: Serving, grads: Sequence[Tensor], max_norm: float, norm_type: float
) -> Tensor | None:
    """Return the norm if one backend serves all and could do everything at once; None if nothing is done."""
    (backend, *others) = serving.values()
    clip_norm_ = getattr(backend, "clip_norm_", None)
    if others or clip_norm_ is None:
        return None
    norm: Tensor | None = clip_norm_(grads, max_norm, norm_type)
    return norm


def _total_norm(
    serving: Serving, tensors: Sequence[Tensor], dtypes: set[torch.dtype], norm_type: float
) -> Tensor:
    """Return the norm in its public dtype; between devices only one 0-d tensor each travels."""
    dtype = torch.float32 if dtypes.isdisjoint(_WIDE) else torch.float64
    home = tensors[0].device
    norms = [
        serving[device].norm(group, norm_type).to(home)
        for device, group in _by_device(serving, tensors).items()
        if any(t.numel() > 0 for t in group)
    ]
    return _combined(norms, norm_type).to(dtype) if norms else torch.zeros((), dtype=dtype, device=home)


def _combined(norms: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return the norm of a list from the norms of its parts; order 0 counts, so counts add up."""
    if len(norms) == 1:
        return norms[0]
    stacked = torch.stack(list(norms))
    total: Tensor = stacked.sum() if norm_type == 0.0 else torch.linalg.vector_norm(stacked, norm_type)
    return total


def _scale_(serving: Serving, grads: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    if max_norm == math.inf:  # only report: even a NaN norm must not turn into a NaN coefficient
        if not operations_are_followed():
            torch.autograd.graph.increment_version(grads)
        return
    coef = clip_coef(norm, max_norm)
    for device, group in _by_device(serving, grads).items():
        # From the CPU, a copy would wait for the device; a number that the host knows is filled in.
        moves = coef.is_cpu and device.type != "cpu" and not operations_are_followed()
        there = coef.new_full((), coef.item(), device=device) if moves else coef.to(device)
        serving[device].scale_(group, there)


def _clamp_(serving: Serving, grads: list[Tensor], low: float, high: float) -> None:
    if not grads:
        return
    dtypes = checks.readable(grads)
    checks.writable(grads)
    checks.representable(dtypes, low, high)
    # No need for checks.unique: clamping a gradient twice is clamping it once.
    for device, group in _by_device(serving, checks.as_plain(grads)).items():
        serving[device].clamp_(group, low, high)


def _devices(tensors: Sequence[Tensor]) -> list[torch.device]:
    if not torch.compiler.is_compiling() and tensors and all(map(_IS_CPU, tensors)):
        return [tensors[0].device]  # four times as fast as asking every tensor for its device
    return list(dict.fromkeys([t.device for t in tensors]))  # in list order: a set's order varies


def _by_device(serving: Serving, tensors: Sequence[Tensor]) -> dict[torch.device, Sequence[Tensor]]:
    if len(serving) == 1:
        return dict.fromkeys(serving, tensors)
    return {device: [t for t in tensors if t.device == device] for device in serving}


def _raise_if_nonfinite(norm: Tensor, norm_type: float, tensors: Sequence[Tensor | None]) -> None:
    if not torch.isfinite(norm):  # the one host synchronisation, asked for by name
        raise RuntimeError(checks.nonfinite_message(norm_type, tensors))
