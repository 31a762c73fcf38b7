"""The gradient list: read once from the parameters, checked, and divided among the backends.

All checks run before the first gradient is touched, so a call that raises has changed nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import _extension, arguments
from gradclip_ext.backends import FOREACH, Selection
from gradclip_ext.backends.base import Backend, TensorList, are_contiguous, is_regular, share_memory
from gradclip_ext.norms import REPORT, Coefficient, Rule, combine_norms, result_dtype, widest_dtype

_COMPLEX = frozenset((torch.complex32, torch.complex64, torch.complex128))
DTYPES = _COMPLEX | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_IS_CPU = operator.attrgetter("is_cpu")

# Tensors of one device and the backend that handles them.
Part = tuple[Backend, TensorList]


class GradientList:
    """The gradients, or other tensors, of one call.

    Args:
        tensors: the tensors in the order given.
        parts: the same tensors by device and backend.
        written: what to write to, where that differs: memory that two gradients share is listed once.
        is_intercepted: see :func:`interception.is_intercepted`.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        parts: list[Part],
        written: list[Part] | None = None,
        is_intercepted: bool = False,
    ) -> None:
        self.tensors = tensors
        self._parts = parts
        self._written = parts if written is None else written
        self._is_intercepted = is_intercepted

    def dtypes(self) -> frozenset[torch.dtype]:
        if len(self._parts) == 1:
            return self._parts[0][1].dtypes
        return frozenset().union(*(tensors.dtypes for _, tensors in self._parts))

    def norm(self, norm_type: float, rule: Rule) -> tuple[Tensor, Coefficient]:
        """Return the norm of all elements as one vector, and the coefficient that the rule makes of it.

        The norm is a new 0-d tensor on the device of the first gradient, float64 if one gradient is, else
        float32. Between devices only one 0-d tensor each travels.
        """
        dtype = result_dtype(self.dtypes())
        device = self.tensors[0].device
        parts = [part for part in self._parts if part[1].has_elements()]
        if not norm_type > 0.0:
            parts = [(b if b.name == "foreach" else FOREACH, tensors) for b, tensors in parts]
        if len(parts) == 1 and parts[0][1].device == device:
            backend, tensors = parts[0]
            return backend.norm(tensors, norm_type, rule, dtype)
        if not parts:
            total = torch.zeros((), dtype=dtype, device=device)
        else:
            wide = widest_dtype(device)
            norms = [
                backend.norm(tensors, norm_type, REPORT, widest_dtype(tensors.device))[0].to(device).to(wide)
                for backend, tensors in parts
            ]
            total = combine_norms(norms, norm_type).to(dtype)
        return total, rule.clip_coef(total)

    def scale_(self, clip_coef: Coefficient) -> None:
        """Multiply every gradient by the coefficient; write nothing where it is 1 or more."""
        self._bump_versions()
        if isinstance(clip_coef, float) and clip_coef >= 1.0:
            return
        for backend, tensors in self._written:
            backend.scale_(tensors, self._moved(clip_coef, tensors.device))

    def clamp_(self, min: float, max: float) -> None:
        """Clamp every gradient to [min, max]."""
        self._bump_versions()
        for backend, tensors in self._written:
            backend.clamp_(tensors, min, max)

    def _moved(self, clip_coef: Coefficient, device: torch.device) -> Coefficient:
        if not isinstance(clip_coef, Tensor) or clip_coef.device == device:
            return clip_coef
        if clip_coef.is_cpu and not self._is_intercepted:
            # A copy from the CPU would wait for the device; a number that the host knows is filled in.
            return clip_coef.new_full((), clip_coef.item(), device=device)
        return clip_coef.to(device)

    def _bump_versions(self) -> None:
        """Count one more change, as torch's in-place operations do: a backward that saved a gradient
        relies on it. Done even if nothing is written, before anything is."""
        if self._is_intercepted:
            return  # then torch's operations count
        torch.autograd.graph.increment_version(self.tensors)  # passes over inference tensors


# ---------------------------------------------------------------- reading


def read_gradients(
    parameters: list[Any], selection: Selection, *, needs_sign: bool = False, allows_sparse: bool = False
) -> GradientList | None:
    """Return the gradients of the parameters that have one, or None for a list with a tensor subclass
    that dispatches by itself (DTensor, FakeTensor): such a list belongs to torch's own functions.

    The same parameter listed twice (a tied weight) is one gradient. Two parameters that share a gradient's
    memory are two gradients, written once.

    Args:
        parameters: the elements as the caller gave them.
        selection: which backend handles a device.
        needs_sign: what will be done depends on the sign of an element, as a clamp between bounds that are
            not symmetric does.
        allows_sparse: sparse gradients can be handled.
    """
    grads = _grads_of(parameters)
    gradients = _read_native(grads, selection, written=True, needs_sign=needs_sign)
    if gradients is not None:
        return gradients
    if _has_dispatch_subclass(grads):
        return None
    check_readable(grads, allows_sparse)
    check_writable(grads, allows_lazy=selection.loops)
    listed_once = _listed_once(parameters)
    if len(listed_once) < len(parameters):
        grads = _grads_of(listed_once)
    plain = _as_plain(grads)
    written = _distinct_memory(plain)
    parts = _parts(plain, selection, is_written=len(written) == len(plain))
    if len(written) == len(plain):
        return GradientList(plain, parts, is_intercepted=selection.is_intercepted)
    written_parts = _parts(written, selection, is_written=True)
    return GradientList(plain, parts, written_parts, selection.is_intercepted)


def read_tensors(tensors: list[Any], selection: Selection) -> GradientList | None:
    """Return any tensors, each as often as it is listed, for reading only; None as read_gradients does."""
    tensors = arguments.all_tensors("tensors", tensors)
    gradients = _read_native(tensors, selection, written=False)
    if gradients is not None:
        return gradients
    if _has_dispatch_subclass(tensors):
        return None
    check_readable(tensors)
    plain = _as_plain(tensors)
    return GradientList(plain, _parts(plain, selection), is_intercepted=selection.is_intercepted)


def _listed_once(parameters: list[Any]) -> list[Any]:
    if torch.compiler.is_compiling():  # it traces no id(), and a tensor's hash is its identity
        return list(dict.fromkeys(parameters))
    return list({id(p): p for p in parameters}.values())


def _grads_of(parameters: list[Any]) -> list[Tensor]:
    try:
        if _extension.C is None or torch.compiler.is_compiling():
            return [grad for grad in [p.grad for p in parameters] if grad is not None]
        grads: list[Tensor] = _extension.C.gradients(parameters)
        return grads
    except AttributeError:
        arguments.raise_if_not_tensors("parameters", parameters)
        raise


def _read_native(
    tensors: list[Tensor], selection: Selection, *, written: bool, needs_sign: bool = False
) -> GradientList | None:
    """Return the list as the compiled module reads it, at a fifth of the time that Python takes.

    None if the module is missing or declines: it takes tensors of one device that kernels take as they are.
    """
    if _extension.C is None or not _extension.C.CAN_READ or selection.is_intercepted or selection.loops:
        return None
    native = _extension.C.read_tensors(tensors, written) if tensors else None
    if native is None:
        return None
    listed = TensorList(tensors, native)
    backend = selection.backend_for(listed.device)
    # Whether memory holds negated values is asked only where it matters: kernels compute norms, products
    # and symmetric clamps without knowing, torch's list operations refuse such tensors.
    if (needs_sign or (written and backend is FOREACH)) and _extension.C.any_negative(tensors):
        return None
    return GradientList(tensors, [(backend, listed)])


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


def _has_dispatch_subclass(tensors: Sequence[Tensor]) -> bool:
    """Tell whether a DTensor, FakeTensor or other ``__torch_dispatch__`` subclass is among them.

    Such a tensor has no memory of its own to read: ``DTensor.data_ptr()`` is 0.
    """
    return not _all_plain(tensors) and any(map(is_dispatch_subclass, tensors))


def is_dispatch_subclass(tensor: Tensor) -> bool:
    """Tell whether a tensor is of a subclass with a ``__torch_dispatch__`` of its own."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _as_plain(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors with ``__torch_function__`` subclasses replaced by plain views of them."""
    if _all_plain(tensors):
        return tensors
    return [t if type(t) in _PLAIN_TYPES else t.as_subclass(Tensor) for t in tensors]


def _all_plain(tensors: Sequence[Tensor]) -> bool:
    return all(kind in _PLAIN_TYPES for kind in set(map(type, tensors)))


def _distinct_memory(tensors: list[Tensor]) -> list[Tensor]:
    """Return the list with gradients that are the same memory, shape, strides and dtype once.

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
        key = (pointer, tensor.device, tensor.dtype, tensor.shape, tensor.stride()) if pointer else None
        if key is None or tensor.numel() == 0 or key not in seen:
            seen.add(key)
            result.append(tensor)
    return result


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout is torch.strided else 0


# ---------------------------------------------------------------- checks


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
        shared = any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride()))
        if shared and tensor.numel() > 0:
            index = next(i for i, t in enumerate(tensors) if t is tensor)
            raise RuntimeError(
                f"{_gradient(index, tensor)} has strides {tensor.stride()}, so it is expanded: more than one "
                "element refers to a single memory location, and it cannot be clipped in place. clone() it "
                "first"
            )


def check_representable(dtypes: Iterable[torch.dtype], *bounds: float) -> None:
    """Raise if a finite bound does not fit one of the gradients' dtypes, or one is complex."""
    for dtype in dtypes:
        if dtype in _COMPLEX:
            raise RuntimeError(f"clamping is not defined for complex gradients, got {dtype}")
        limit = torch.finfo(dtype).max
        for bound in bounds:
            if limit < abs(bound) < math.inf:
                raise RuntimeError(
                    f"the bound {bound} cannot be represented in {dtype} without overflow "
                    f"(largest value {limit}): use a smaller bound, or inf for none"
                )


def _gradient(index: int, tensor: Tensor) -> str:
    return f"gradient {index} (shape {tuple(tensor.shape)})"
