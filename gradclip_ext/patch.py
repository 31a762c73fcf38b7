"""Swapping torch.nn.utils' clipping functions for these, for code one cannot edit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.utils.clip_grad

from gradclip_ext import clip

# A module and the name of a function there.
_Place = tuple[ModuleType, str]
_Functions = dict[_Place, Callable[..., Any]]

_TORCH = torch.nn.utils.clip_grad
# By the names that torch's functions were defined with. Those with an underscore are imported by other
# libraries, too (verl's fsdp_utils, and copies of it).
_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "clip_grad_norm_": clip.clip_grad_norm_,
    "clip_grad_value_": clip.clip_grad_value_,
    "_clip_grads_with_norm_": clip.clip_grads_with_norm_,
    "_get_total_norm": clip.get_total_norm,
}
_IN_TORCH: _Functions = {
    (torch.nn.utils, "clip_grad_norm_"): clip.clip_grad_norm_,
    (torch.nn.utils, "clip_grad_value_"): clip.clip_grad_value_,
    (torch.nn.utils, "clip_grads_with_norm_"): clip.clip_grads_with_norm_,
    (torch.nn.utils, "get_total_norm"): clip.get_total_norm,
    **{(_TORCH, name): function for name, function in _REPLACEMENTS.items()},
}
# What was there before the first patch is kept in torch's module, where a reload of this one finds it. It is
# there for as long as the patch is.
_ORIGINALS = "_replaced_by_gradclip_ext"


class TorchPatch:
    """What :func:`patch_torch` returns; leaving its ``with`` block restores what was there before it."""

    def __init__(self) -> None:
        self._before = [_state()]
        self._entered = False
        _patch()

    @property
    def places(self) -> list[str]:
        """Where functions are replaced now: ``module.name`` of each, those of torch first."""
        return places()

    def __enter__(self) -> TorchPatch:
        if self._entered:  # a second `with` on one object has a "before" of its own
            self._before.append(_state())
        self._entered = True
        _patch()
        return self

    def __exit__(self, *exception: object) -> None:
        functions, originals = self._before.pop()
        # What was found and replaced inside of the block has no state from before it.
        _install({**vars(_TORCH).pop(_ORIGINALS, {}), **functions})
        if originals is not None:
            vars(_TORCH)[_ORIGINALS] = originals


def patch_torch() -> TorchPatch:
    """Replace torch.nn.utils' clipping functions by those of this package.

    They are replaced in ``torch.nn.utils`` and ``torch.nn.utils.clip_grad``, also by the private
    names ``_get_total_norm`` and ``_clip_grads_with_norm_``, for code that looks them up when it
    calls them (transformers, accelerate, Lightning); and in every module imported so far that
    holds one of them under any name, from ``from torch.nn.utils import ...`` (skorch). Modules
    imported later get these functions, too. What no module holds is not found: an attribute of an
    object or class, a default argument, a ``functools.partial``.
    Idempotent and not counted: however often it was called, one :func:`unpatch_torch`
    restores torch.

    Returns:
        A context manager; leaving its ``with`` block restores what was there when it was
        entered. Without ``with`` the patch simply stays. ``places`` lists where functions are
        replaced, :func:`gradclip_ext.info.report` also how many calls came through.

    Note:
        Of this process only. ``python -m gradclip_ext script.py`` runs a script under the patch,
        and ``python -m gradclip_ext --install-startup`` lets spawned workers have it.

    Examples:
        >>> with patch_torch():
        ...     torch.nn.utils.clip_grad_norm_ is clip_grad_norm_
        True
        >>> torch.nn.utils.clip_grad_norm_ is clip_grad_norm_
        False
    """
    return TorchPatch()


def unpatch_torch() -> None:
    """Put back the functions that the first :func:`patch_torch` replaced, however often it was called."""
    _install(vars(_TORCH).pop(_ORIGINALS, {}))


def places() -> list[str]:
    """Return ``module.name`` of each function that is replaced in this process, empty without a patch."""
    return [f"{module.__name__}.{name}" for module, name in vars(_TORCH).get(_ORIGINALS, {})]


def _patch() -> None:
    replacements = {**_IN_TORCH, **_holders()}
    originals = vars(_TORCH).setdefault(_ORIGINALS, {})
    for place, function in _current(replacements).items():
        originals.setdefault(place, function)
    _install(replacements)


def _state() -> tuple[_Functions, _Functions | None]:
    """Return the functions in place, and those that a patch has replaced if there is one."""
    originals = vars(_TORCH).get(_ORIGINALS)
    return _current({**_IN_TORCH, **(originals or {})}), None if originals is None else dict(originals)


def _holders() -> _Functions:
    """Return where else modules hold torch's functions, with their replacements."""
    found: _Functions = {}
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue  # some libraries put objects there, whose attributes may do anything
        for name, value in list(vars(module).items()):
            # Not isinstance: some objects in modules warn when they are asked for their class.
            if type(value) is FunctionType and value.__globals__ is vars(_TORCH):
                replacement = _REPLACEMENTS.get(value.__name__)
                if replacement is not None and (module, name) not in _IN_TORCH:
                    found[module, name] = replacement
    return found


def _current(at: _Functions) -> _Functions:
    return {(module, name): vars(module)[name] for module, name in at if name in vars(module)}


def _install(functions: _Functions) -> None:
    for (module, name), function in functions.items():
        setattr(module, name, function)
