"""Arguments: numbers, bounds and iterables are converted, or refused with a sentence.

Numbers are compared rather than asked by math.isnan() and the like: torch.compile cannot trace those for a
number that changes from call to call.
"""

from __future__ import annotations

import math
import operator
import types
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext.interception import is_intercepted
from gradclip_ext.norms import Limit, as_floating, whole


def as_float(name: str, value: Any) -> float:
    """Return ``float(value)``; whatever float() refuses is named in the error."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{name} must be a number (int, float, numeric string or one-element tensor with a value) "
            f"that a float can hold, got {describe(value)}"
        ) from error


def as_threshold(name: str, value: Any) -> float:
    """Return ``value`` as a float that is neither NaN nor negative; inf is allowed."""
    number = as_float(name, value)
    if not number >= 0.0:
        raise ValueError(f"{name} must be 0 or more (inf allowed), got {number}")
    return number


def as_number_up_to(name: str, value: Any, high: float = math.inf) -> float:
    """Return ``value`` as a finite float from 0 to a highest one."""
    number = as_float(name, value)
    if not 0.0 <= number <= high or number == math.inf:
        allowed = "finite, and 0 or more" if high == math.inf else f"from 0 to {high:g}"
        raise ValueError(f"{name} must be {allowed}, got {number}: pass such a number")
    return number


def as_count(name: str, value: Any, least: int) -> int:
    """Return ``value`` as an int that is not less than another."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an int, got {describe(value)}: pass a whole number") from error
    if number < least:
        raise ValueError(f"{name} must be {least} or more, got {number}: pass such a number")
    return number


def as_limit(value: Any, *, allows_vector: bool = True, allows_function: bool = True) -> Limit:
    """Return max_norm as a float, or as the tensor or function that decides about it later.

    Tensors in CPU memory are checked as a number is, because the host can see their values.
    """
    if isinstance(value, Tensor):
        if value.dtype is torch.bool:
            raise TypeError(
                f"max_norm must be the largest allowed norm, got {describe(value)}: pass a number (a "
                "condition is for skip_step_)"
            )
        if value.is_complex():
            raise TypeError(f"max_norm must be a real number, got a tensor of {value.dtype}: pass its abs()")
        limit = as_floating(whole(value).detach())
        is_visible = limit.is_cpu and not is_intercepted()
        if limit.numel() == 1:
            return as_threshold("max_norm", limit) if is_visible else limit.reshape(())
        if limit.dim() == 1 and not allows_vector:
            raise ValueError(
                f"max_norm must be a number or a tensor with one element, got shape {tuple(limit.shape)}: "
                "pass per_tensor=True for a limit for each parameter"
            )
        if limit.dim() == 1:
            if is_visible and not (limit >= 0.0).all():
                index = int((limit >= 0.0).long().argmin())
                raise ValueError(f"max_norm must be 0 or more (inf allowed), got {limit[index]} at {index}")
            return limit
    elif callable(value):
        if not allows_function:
            raise TypeError(
                f"max_norm must be a number or a tensor, got the function {describe(value)}: call it with "
                "the norm, and pass what it returns"
            )
        function: Limit = value
        return function
    elif isinstance(value, (list, tuple)):
        hint = "pass torch.tensor(...) of it" if allows_vector else "pass one number"
        raise TypeError(f"max_norm must be a number or a tensor, got {describe(value)}: {hint}")
    return as_threshold("max_norm", value)


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
    if isinstance(tensors, torch.nn.Module) and not hasattr(tensors, "__iter__"):
        raise TypeError(
            f"{name} must be a Tensor or an iterable of Tensors, got the module "
            f"{type(tensors).__name__}: pass {_of_a_module(name)}"
        )
    if isinstance(tensors, str) or not (isinstance(tensors, Iterable) or hasattr(tensors, "__getitem__")):
        hint = ""
        if isinstance(tensors, torch.optim.Optimizer):
            hint = f": pass {_OF_AN_OPTIMIZER}"
        elif isinstance(tensors, types.MethodType):
            hint = f": call it, {tensors.__name__}()"
        raise TypeError(f"{name} must be a Tensor or an iterable of Tensors, got {describe(tensors)}{hint}")
    result = list(tensors)
    if isinstance(tensors, Mapping) and not all(isinstance(key, Tensor) for key in result):
        hint = f"pass {_of_a_mapping(name, tensors)}"
        raise TypeError(f"{name} must be an iterable of Tensors, got {describe(tensors)}: {hint}")
    if not result and isinstance(tensors, types.GeneratorType) and name != "tensors":
        warnings.warn(
            f"`{name}` is an empty generator, no gradient clipping will occur.",
            stacklevel=4,  # as_list, the public function, calls.profiled around it, the caller
        )
    return result


def as_total_norm(value: Any) -> Tensor:
    """Return ``value``, a real tensor, as a 0-d tensor if it has one element, or as a vector."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"total_norm must be a 0-d Tensor, as get_total_norm returns it, got {describe(value)}: "
            "wrap a number in torch.tensor(...)"
        )
    if value.is_complex():
        raise TypeError(f"total_norm must be real, got {value.dtype}: pass its abs()")
    if value.numel() == 1:
        return value if value.dim() == 0 else value.reshape(())
    if value.dim() != 1 or value.numel() == 0:
        raise ValueError(
            f"total_norm must have one element, or shape (T,) for T parameters, got shape "
            f"{tuple(value.shape)}: take one element of it, or combine the norms first"
        )
    return value


def not_negative(total_norm: Tensor) -> Tensor:
    """Return a norm, or norms, of which none is negative; NaN may be."""
    if total_norm.is_cpu and not is_intercepted():
        if (total_norm < 0.0).any():
            raise ValueError(
                f"total_norm must be 0 or more, as a norm is, got {total_norm.amin().item()}: pass what "
                "get_total_norm returns"
            )
        return total_norm
    return as_floating(total_norm).clamp(min=0.0)


def all_tensors(name: str, tensors: Sequence[Any]) -> list[Tensor]:
    """Return ``tensors`` if every element is a Tensor."""
    if not all(isinstance(t, Tensor) for t in tensors):
        raise_if_not_tensors(name, tensors)
    return list(tensors)


def raise_if_not_tensors(name: str, elements: Sequence[Any]) -> None:
    """Raise if an element is not a tensor; say which, and what was probably meant."""
    for index, element in enumerate(elements):
        if isinstance(element, Tensor):
            continue
        hint = ""
        if isinstance(element, tuple):
            hint = ": pass module.parameters(), not named_parameters()"
        elif isinstance(element, torch.nn.Module):
            hint = f": pass {_of_a_module(name)}"
        elif isinstance(element, dict) and "params" in element:
            hint = f": pass {_OF_AN_OPTIMIZER}"
        elif isinstance(element, (list, set, dict)):
            hint = ": flatten nested lists first"
        elif isinstance(element, str):
            hint = ": names came instead of tensors, so pass the values()"
        elif element is None:
            hint = ": leave out parameters without a gradient"
        raise TypeError(
            f"every element of {name} must be a Tensor, got {describe(element)} at position {index}{hint}"
        )


_OF_AN_OPTIMIZER = "[p for group in optimizer.param_groups for p in group['params']]"


def _of_a_mapping(name: str, mapping: Mapping[Any, Any]) -> str:
    if "params" in mapping:
        return "group['params']"
    if name != "tensors" and not any(getattr(value, "requires_grad", True) for value in mapping.values()):
        return "module.parameters() (those of a state_dict have no gradients)"
    return "its values()"


def _of_a_module(name: str) -> str:
    # get_total_norm of its parameters would be the norm of the weights.
    if name == "tensors":
        return "[p.grad for p in module.parameters() if p.grad is not None]"
    return "module.parameters()"


def describe(value: Any) -> str:
    """Return what was passed, for a message: in one line of moderate length."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"
