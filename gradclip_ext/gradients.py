"""The gradient list: read once from the parameters, checked, and divided among the backends.

All checks run before the first gradient is touched, so a call that raises has changed nothing.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _extension, arguments
from gradclip_ext.backends import FOREACH, Selection
from gradclip_ext.backends.base import (
    TensorList,
    addresses_of,
    are_contiguous,
    flat_view,
    is_regular,
    share_memory,
)
from gradclip_ext.checks import check_readable, check_writable
from gradclip_ext.gradient_list import GradientList, Part
from gradclip_ext.segments import listed_once

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_IS_CPU = operator.attrgetter("is_cpu")

# ---------------------------------------------------------------- reading


def read_gradients(
    parameters: list[Any],
    selection: Selection,
    *,
    written: bool = True,
    clamps: bool = False,
    needs_sign: bool = False,
    allows_sparse: bool = False,
    norm_type: float | None = None,
    group: Any = None,
    copies: Any = None,
) -> GradientList | None:
    """Return the gradients of the parameters that have one, or None for a list with a tensor subclass
    that dispatches by itself (FakeTensor): such a list belongs to torch's own functions.

    The same parameter listed twice (a tied weight) is one gradient. Two parameters that share a gradient's
    memory are two gradients, written once. :mod:`gradclip_ext.distributed` reads what is sharded.

    Args:
        parameters: the elements as the caller gave them.
        selection: which backend handles a device.
        written: the gradients are going to be changed, not only read.
        clamps: the gradients are going to be clamped, not scaled.
        needs_sign: what will be done depends on the sign of an element, as a clamp between bounds that are
            not symmetric does.
        allows_sparse: sparse gradients can be handled.
        norm_type: the order of the norm that will be asked for, None if none will.
        group: other ranks with gradients of the model, see :func:`clip.clip_grad_norm_`.
        copies: on how many ranks of the group a gradient lies, see there.
    """
    if copies is not None:
        check_group(group, copies)
    grads = grads_of(parameters)
    # A rank without some gradient, even without any, takes part like those that have it.
    is_sharded = group is not None or (len(grads) < len(parameters) and holds_dtensor(parameters))
    if not is_sharded:
        gradients = _read_native(
            grads,
            selection,
            written=written,
            needs_sign=needs_sign,
            complex_as_real=written and norm_type == 2.0,
        )
        if gradients is not None:
            return gradients
        is_sharded = holds_dtensor(grads)
    if is_sharded:
        if _is_untraceable(group):
            return None
        from gradclip_ext import distributed  # noqa: PLC0415  (importing torch's DTensor takes a second)

        return distributed.read_gradients(
            parameters,
            grads,
            selection,
            written=written,
            clamps=clamps,
            needs_sign=needs_sign,
            allows_sparse=allows_sparse,
            norm_type=norm_type,
            group=group,
            copies=copies,
        )
    if has_dispatch_subclass(grads):
        return None
    if not written:
        return read_only(grads, selection)
    plain = as_plain(grads)  # first: a __torch_function__ would see each question of the checks
    check_readable(plain, allows_sparse)
    check_writable(plain, allows_lazy=selection.loops)
    once = listed_once(parameters)
    return _divided(as_plain(grads_of(once)) if len(once) < len(parameters) else plain, selection)


def read_written(
    grads: list[Tensor], selection: Selection, *, needs_sign: bool = False, allows_sparse: bool = False
) -> GradientList:
    """Return gradients that are in this rank's memory, to be read and written."""
    gradients = _read_native(grads, selection, written=True, needs_sign=needs_sign)
    if gradients is not None:
        return gradients
    plain = as_plain(grads)
    check_readable(plain, allows_sparse)
    check_writable(plain, allows_lazy=selection.loops)
    return _divided(plain, selection)


def _divided(plain: list[Tensor], selection: Selection) -> GradientList:
    written = _distinct_memory(plain)
    parts = _parts(plain, selection, is_written=len(written) == len(plain))
    if len(written) == len(plain):
        return GradientList(plain, parts, is_intercepted=selection.is_intercepted)
    written_parts = _parts(written, selection, is_written=True)
    return GradientList(plain, parts, written_parts, selection.is_intercepted)


def read_tensors(
    tensors: list[Any],
    selection: Selection,
    *,
    norm_type: float = 2.0,
    magnitudes: bool = False,
    group: Any = None,
    copies: Any = None,
) -> GradientList | None:
    """Return any tensors, each as often as it is listed, for reading only; None as read_gradients does.

    ``magnitudes``: more than a norm will be asked for.
    """
    if copies is not None:
        check_group(group, copies)
    tensors = arguments.all_tensors("tensors", tensors)
    is_sharded = group is not None
    if not is_sharded:
        as_real = norm_type == 2.0 and not magnitudes
        gradients = _read_native(tensors, selection, written=False, complex_as_real=as_real)
        if gradients is not None:
            return gradients
        is_sharded = holds_dtensor(tensors)
    if is_sharded:
        if _is_untraceable(group):
            return None
        from gradclip_ext import distributed  # noqa: PLC0415  (importing torch's DTensor takes a second)

        return distributed.read_tensors(tensors, selection, norm_type=norm_type, group=group, copies=copies)
    if has_dispatch_subclass(tensors):
        return None
    return read_only(tensors, selection)


def read_only(tensors: list[Tensor], selection: Selection) -> GradientList:
    """Return tensors that are in this rank's memory, to be read."""
    gradients = _read_native(tensors, selection, written=False)
    if gradients is not None:
        return gradients
    plain = as_plain(tensors)
    check_readable(plain)
    return GradientList(plain, _parts(plain, selection), is_intercepted=selection.is_intercepted)


def _is_untraceable(group: Any) -> bool:
    """Tell whether torch.compile is at work: it traces no look at meshes, but torch's own functions."""
    if torch.compiler.is_compiling() and group is not None:
        raise RuntimeError("group= cannot be traced by torch.compile: clip outside of the compiled function")
    return torch.compiler.is_compiling()


def holds_dtensor(tensors: Sequence[Any]) -> bool:
    """Tell whether one of the tensors is a DTensor, without importing what no DTensor exists without."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def check_group(group: Any, copies: Any) -> None:
    """Raise if these are not what ``group=`` and ``copies=`` take."""
    if copies is not None and not callable(copies):
        raise TypeError(
            "copies must be a function from a parameter to the number of ranks of group= on which its "
            f"gradient lies, got {arguments.describe(copies)}: pass for instance lambda parameter: 2"
        )
    if copies is not None and group is None:
        raise ValueError(
            "copies was passed without group: it says on how many ranks of group= a gradient lies, so pass "
            "both"
        )
    if group is not None:
        from gradclip_ext._layout import as_groups  # noqa: PLC0415  (torch.distributed takes a second)

        as_groups(group)


def grads_of(parameters: list[Any]) -> list[Tensor]:
    """Return the gradients of those parameters that have one, in order."""
    try:
        if _extension.C is None or torch.compiler.is_compiling():
            return [grad for grad in [p.grad for p in parameters] if grad is not None]
        grads: list[Tensor] = _extension.C.gradients(parameters)
        return grads
    except AttributeError:
        arguments.raise_if_not_tensors("parameters", parameters)
        raise


def _read_native(
    tensors: list[Tensor],
    selection: Selection,
    *,
    written: bool,
    needs_sign: bool = False,
    complex_as_real: bool = False,
) -> GradientList | None:
    """Return the list as the compiled module reads it, at a fifth of the time that Python takes.

    None if the module is missing or declines. ``complex_as_real``: of complex tensors, nothing but the norm
    of order 2 is asked.
    """
    if _extension.C is None or not _extension.C.CAN_READ or selection.is_intercepted or selection.loops:
        return None
    if not tensors:
        return None
    part = _native_part(tensors, selection, written, needs_sign)
    if part is not None:
        return GradientList(tensors, [part])
    return _read_set_apart(tensors, selection, written, needs_sign, complex_as_real)


def _native_part(tensors: list[Tensor], selection: Selection, written: bool, needs_sign: bool) -> Part | None:
    native = _extension.C.read_tensors(tensors, written)
    if native is None:
        return None
    listed = TensorList(tensors, native)
    backend = selection.backend_for(listed.device)
    # Whether memory holds negated values is asked only where it matters: kernels compute norms, products
    # and symmetric clamps without knowing, torch's list operations refuse such tensors.
    if (needs_sign or (written and backend is FOREACH)) and _extension.C.any_negative(tensors):
        return None
    return backend, listed


def _read_set_apart(
    tensors: list[Tensor], selection: Selection, written: bool, needs_sign: bool, complex_as_real: bool
) -> GradientList | None:
    """Read tensors of several devices, or with some that kernels do not take: only these are looked at in
    Python. None where they need more than that: errors, subclasses, shared memory."""
    by_device, positions = _extension.C.set_apart(tensors, written)
    others = [tensors[i] for i in positions]
    if (len(by_device) == 1 and not others) or not _all_plain(others):  # the first ones share memory
        return None
    parts: list[Part] = []
    for own in by_device:
        part = _native_part([tensors[i] for i in own], selection, written, needs_sign)
        if part is None:
            return None
        parts.append(part)
    try:
        check_readable(others)
        if written:
            check_writable(others, allows_lazy=False)
    except (TypeError, RuntimeError):  # which has to name the position in the whole list
        return None
    if written and share_memory(others):  # as where a parameter is listed twice
        return None
    if written and any(p.native().overlaps(*ends) for _, p in parts for ends in addresses_of(others)):
        return None
    apart: list[Part] = []
    for device, group in _by_device(others).items():
        selection.backend_for(device)  # raises if a backend was named that cannot handle the device
        apart.append((FOREACH, TensorList(group)))
    if not complex_as_real or not any(t.is_complex() for t in others):
        return GradientList(tensors, parts + apart)
    read = [part for _, group in apart for part in _with_complex_as_real(group, selection)]
    return GradientList(tensors, parts + read, parts + apart)


def _with_complex_as_real(group: TensorList, selection: Selection) -> list[Part]:
    """Return parts for the norm of order 2, which is that of the real and the imaginary parts. To be scaled,
    complex numbers go to torch: its product with an infinity is another one."""
    pairs = [t for t in group.tensors if t.is_complex() and not t.is_conj()]
    views = [torch.view_as_real(t) for t in pairs]
    by_device, _ = _extension.C.set_apart(views, False)
    if not by_device:
        return [(FOREACH, group)]
    (positions,) = by_device
    native = _extension.C.read_tensors([views[i] for i in positions], False)
    kernels = selection.backend_for(group.device), TensorList([pairs[i] for i in positions], native)
    known = {id(pairs[i]) for i in positions}
    rest = [t for t in group.tensors if id(t) not in known]
    return [kernels, (FOREACH, TensorList(rest))] if rest else [kernels]


def _parts(tensors: list[Tensor], selection: Selection, *, is_written: bool = False) -> list[Part]:
    """Divide tensors by device, and set apart those that kernels cannot handle.

    Where tensors that will be written to share some of their memory, the order of writing matters: foreach
    handles them in the order of the list.
    """
    parts: list[Part] = []
    for device, group in _by_device(tensors).items():
        backend = selection.backend_for(device)
        if backend.name != "foreach" and is_written and share_memory(group):
            backend = FOREACH
        if backend.name == "foreach" or are_contiguous(group):
            parts.append((backend, TensorList(group)))
            continue
        regular: list[Tensor] = []
        irregular: list[Tensor] = []
        for tensor in group:
            (regular if is_regular(tensor) else irregular).append(tensor)
        parts += [(b, TensorList(part)) for b, part in ((backend, regular), (FOREACH, irregular)) if part]
    return parts


def _by_device(tensors: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    if not torch.compiler.is_compiling() and tensors and all(map(_IS_CPU, tensors)):
        return {tensors[0].device: tensors}  # four times as fast as asking every tensor for its device
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    return found


def has_dispatch_subclass(tensors: Sequence[Tensor]) -> bool:
    """Tell whether a DTensor, FakeTensor or other ``__torch_dispatch__`` subclass is among them.

    Such a tensor has no memory of its own to read: ``DTensor.data_ptr()`` is 0.
    """
    return not _all_plain(tensors) and any(map(is_dispatch_subclass, tensors))


def is_dispatch_subclass(tensor: Tensor) -> bool:
    """Tell whether a tensor is of a subclass with a ``__torch_dispatch__`` of its own."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def as_plain(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors with ``__torch_function__`` subclasses replaced by plain views of them."""
    if _all_plain(tensors):
        return tensors
    return [t if type(t) in _PLAIN_TYPES else t.as_subclass(Tensor) for t in tensors]


def _all_plain(tensors: Sequence[Tensor]) -> bool:
    return all(kind in _PLAIN_TYPES for kind in set(map(type, tensors)))


def _distinct_memory(tensors: list[Tensor]) -> list[Tensor]:
    """Return the list with gradients of one dtype that are the same memory once: with as many elements and no
    gaps, or of the same shape and strides.

    Tensors without elements or without memory of their own (data_ptr 0) are never the same.
    """
    if torch.compiler.is_compiling():  # then one object is one gradient
        return list(dict.fromkeys(tensors))
    try:
        pointers = list(map(_address, tensors))
    except RuntimeError:  # torch.func's tensors have no address
        return list(dict.fromkeys(tensors))
    if len(set(pointers)) == len(pointers):
        return tensors
    seen: set[Any] = set()
    result = []
    for tensor, pointer in zip(tensors, pointers):
        if pointer == 0 or tensor.numel() == 0:
            result.append(tensor)
            continue
        layout = tensor.numel() if flat_view(tensor) is not None else (tensor.shape, tensor.stride())
        key = pointer, tensor.device, tensor.dtype, tensor.is_neg(), layout
        if key not in seen:
            seen.add(key)
            result.append(tensor)
    return result


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout is torch.strided else 0
