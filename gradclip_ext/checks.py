"""What may be passed in: every exception about an argument or a gradient is raised here.

Numbers are compared rather than asked by math.isnan() and the like: torch.compile cannot trace those
for a number that changes from call to call.

All checks run before the first gradient is touched, so a call that raises has changed
nothing. The passing path costs about half a microsecond per gradient; what to say about
an offender is worked out only once there is one.
"""

from __future__ import annotations

import math
import sys
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = frozenset(
    (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    )
)
_COMPLEX = frozenset((torch.complex64, torch.complex128))
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


# ---------------------------------------------------------------- arguments


def as_float(name: str, value: Any) -> float:
    """Return ``float(value)``; whatever float() refuses is named in the error."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{name} must be a number (int, float, numeric string or one-element tensor with a value) "
            f"that a float can hold, got {_describe(value)}"
        ) from error


def as_threshold(name: str, value: Any) -> float:
    """Return ``value`` as a float that is neither NaN nor negative; inf is allowed."""
    number = as_float(name, value)
    if not number >= 0.0:
        raise ValueError(f"{name} must be 0 or more (inf allowed), got {number}")
    return number


def as_bounds(min: Any, max: Any) -> tuple[float, float]:
    """Return ``(min, max)`` as floats, a bound that is None becoming -inf or inf."""
    if min is None and max is None:
        raise ValueError("min and max are both None, so nothing would be clamped: pass at least one")
    low = -math.inf if min is None else as_float("min", min)
    high = math.inf if max is None else as_float("max", max)
    if low > high:
        raise ValueError(f"min must not exceed max, got min={low}, max={high}")
    if not low <= high:
        raise ValueError(f"min and max must not be NaN, got min={low}, max={high}")
    return low, high


def as_list(name: str, tensors: Any) -> list[Any]:
    """Return the iterable (or single tensor) as a list; as in torch, no parameters from a generator warn."""
    if type(tensors) is list:  # the usual case, and a copy would touch every tensor
        return tensors
    if isinstance(tensors, Tensor):
        return [tensors]
    if isinstance(tensors, torch.nn.Module) and not isinstance(tensors, torch.nn.ParameterList):
        raise TypeError(
            f"{name} must be a Tensor or an iterable of Tensors, got the module "
            f"{type(tensors).__name__}: pass {_of_a_module(name)}"
        )
    if isinstance(tensors, str) or not isinstance(tensors, Iterable):
        raise TypeError(f"{name} must be a Tensor or an iterable of Tensors, got {_describe(tensors)}")
    result = list(tensors)
    if isinstance(tensors, Mapping) and not all(isinstance(key, Tensor) for key in result):
        raise TypeError(f"{name} must be an iterable of Tensors, got {_describe(tensors)}: pass its values()")
    if not result and isinstance(tensors, types.GeneratorType) and name != "tensors":
        warnings.warn(
            f"`{name}` is an empty generator, no gradient clipping will occur.",
            stacklevel=3,  # as_list, the public function, the caller
        )
    return result


def total_norm(value: Any) -> Tensor:
    """Return ``value`` if it can serve as a total norm: a real 0-d tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"total_norm must be a 0-d Tensor, as get_total_norm returns it, got {_describe(value)}: "
            "wrap a number in torch.tensor(...)"
        )
    if value.dim() != 0:
        raise ValueError(
            f"total_norm must be a 0-d Tensor, got shape {tuple(value.shape)}: "
            "take one element of it, or combine the norms first"
        )
    if value.is_complex():
        raise TypeError(f"total_norm must be real, got {value.dtype}: pass its abs()")
    return value


# ---------------------------------------------------------------- what hooks can be put on


def not_sharded(module: torch.nn.Module) -> None:
    """Refuse a module of ``fully_shard``'s: it gathers its parameters into other tensors for every pass."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has such a module has imported it
    if fsdp and any(isinstance(m, fsdp.FSDPModule) for m in module.modules()):
        _raise_hooks_never_run(f"{type(module).__name__} is or holds a module of FSDP's fully_shard")


def hooks_run(tensors: Sequence[Tensor]) -> None:
    """Refuse parameters that FSDP has made views of a flat one, which is the one that gets a gradient."""
    for tensor in tensors:
        if getattr(tensor, "_fsdp_flattened", False) and not hasattr(tensor, "_is_flat_param"):
            _raise_hooks_never_run(f"a parameter of shape {tuple(tensor.shape)} is part of FSDP's flat one")


def _raise_hooks_never_run(why: str) -> NoReturn:
    raise RuntimeError(
        f"{why}, so hooks on its parameters would never run: call clamp_grad_(parameters, min, max) after "
        "backward"
    )


# ---------------------------------------------------------------- gradients


def gradients(parameters: Sequence[Any]) -> list[Tensor]:
    """Return the gradients that are there, in order."""
    try:
        return [grad for grad in [p.grad for p in parameters] if grad is not None]
    except AttributeError:
        _raise_not_a_tensor("parameters", parameters)
        raise


def all_tensors(name: str, tensors: Sequence[Any]) -> list[Tensor]:
    """Return ``tensors`` if every element is a Tensor."""
    if not all(isinstance(t, Tensor) for t in tensors):
        _raise_not_a_tensor(name, tensors)
    return list(tensors)


def has_dispatch_subclass(tensors: Sequence[Tensor]) -> bool:
    """Tell whether a DTensor, FakeTensor or other ``__torch_dispatch__`` subclass is among them.

    Such a tensor has no memory of its own to read (``DTensor.data_ptr()`` is 0), so the
    list belongs to torch's own functions.
    """
    return not _all_plain(tensors) and any(
        type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__ for t in tensors
    )


def as_plain(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors with ``__torch_function__`` subclasses replaced by plain views of them."""
    if _all_plain(tensors):
        return tensors
    return [t if type(t) in _PLAIN_TYPES else t.as_subclass(Tensor) for t in tensors]


def _all_plain(tensors: Sequence[Tensor]) -> bool:
    return all(kind in _PLAIN_TYPES for kind in set(map(type, tensors)))


def readable(tensors: Sequence[Tensor]) -> set[torch.dtype]:
    """Return the dtypes; raise unless every tensor is strided and of an allowed dtype."""
    dtypes = {t.dtype for t in tensors}
    if dtypes <= DTYPES and {t.layout for t in tensors} <= {torch.strided}:
        return dtypes
    for index, tensor in enumerate(tensors):
        where = _gradient(index, tensor)
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"{where} has layout {tensor.layout}; only strided (dense) gradients can be "
                "clipped: call to_dense(), or build the embedding with sparse=False"
            )
        if tensor.dtype not in DTYPES:
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in DTYPES))
            raise TypeError(f"{where} has dtype {tensor.dtype}; allowed are {names}: convert it first")
    return dtypes


def writable(tensors: Sequence[Tensor]) -> None:
    """Raise unless every tensor may be written in place, each memory location once."""
    if torch.compiler.is_compiling():
        irregular = list(tensors)
    else:
        if not torch.is_inference_mode_enabled() and any(map(Tensor.is_inference, tensors)):
            index = next(i for i, t in enumerate(tensors) if t.is_inference())
            raise RuntimeError(
                f"{_gradient(index, tensors[index])} is an inference tensor, which cannot be changed "
                "outside of inference mode: clone() it first, or clip inside the mode"
            )
        if any(map(Tensor.is_neg, tensors)) or any(map(Tensor.is_conj, tensors)):
            index = next(i for i, t in enumerate(tensors) if t.is_neg() or t.is_conj())
            raise RuntimeError(
                f"{_gradient(index, tensors[index])} is a lazy conjugate or negative view: "
                "call resolve_conj() or resolve_neg() on it first"
            )
        irregular = [] if all(map(Tensor.is_contiguous, tensors)) else list(tensors)
    for index, tensor in enumerate(irregular):
        shared = any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride()))
        if shared and tensor.numel() > 0:
            raise RuntimeError(
                f"gradient {index} (shape {tuple(tensor.shape)}, strides {tensor.stride()}) is "
                "expanded: more than one element refers to a single memory location, so it "
                "cannot be clipped in place. clone() it first"
            )


def representable(dtypes: Iterable[torch.dtype], *bounds: float) -> None:
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


def unique(tensors: list[Tensor]) -> list[Tensor]:
    """Return the list with each gradient once, by memory, shape, strides and dtype.

    A tied weight listed twice is one parameter. Zero-size tensors and tensors without
    memory of their own (data_ptr 0) are never duplicates.
    """
    try:
        pointers = None if torch.compiler.is_compiling() else list(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # torch.func's tensors have no address
        pointers = None
    if pointers is None:  # one object is one gradient
        return list(dict.fromkeys(tensors))
    if len(set(pointers)) == len(pointers):
        return tensors
    seen: set[Any] = set()
    result = []
    for tensor, pointer in zip(tensors, pointers):
        key = (pointer, tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if pointer == 0 or tensor.numel() == 0 or key not in seen:
            seen.add(key)
            result.append(tensor)
    return result


# ---------------------------------------------------------------- messages


def _gradient(index: int, tensor: Tensor) -> str:
    return f"gradient {index} (shape {tuple(tensor.shape)})"


def nonfinite_message(norm_type: float, tensors: Sequence[Tensor | None]) -> str:
    """Return torch's sentence about a non-finite norm plus where the first bad value is."""
    culprit = "Every gradient is finite: the norm itself is beyond the largest float."
    for index, tensor in enumerate(tensors):
        if tensor is not None and not _all_finite(tensor):
            culprit = (
                f"The first non-finite value is in tensor {index} of the list, shape {tuple(tensor.shape)}."
            )
            break
    return (
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
        "so it cannot be clipped. To disable this error and scale the gradients by the "
        f"non-finite norm anyway, set `error_if_nonfinite=False`. {culprit}"
    )


def _all_finite(tensor: Tensor) -> bool:
    # The inf-norm is finite exactly when every element is, and needs no mask as large as the tensor.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.linalg.vector_norm(tensor, math.inf)))


def _raise_not_a_tensor(name: str, elements: Sequence[Any]) -> None:
    for index, element in enumerate(elements):
        if isinstance(element, Tensor):
            continue
        hint = ""
        if isinstance(element, tuple):
            hint = ": pass module.parameters(), not named_parameters()"
        elif isinstance(element, torch.nn.Module):
            hint = f": pass {_of_a_module(name)}"
        elif isinstance(element, dict) and "params" in element:
            hint = ": pass [p for group in optimizer.param_groups for p in group['params']]"
        elif isinstance(element, (list, set, dict)):
            hint = ": flatten nested lists first"
        raise TypeError(
            f"every element of {name} must be a Tensor, got {_describe(element)} at position {index}{hint}"
        )


def _of_a_module(name: str) -> str:
    # get_total_norm of its parameters would be the norm of the weights.
    if name == "tensors":
        return "[p.grad for p in module.parameters() if p.grad is not None]"
    return "module.parameters()"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"
