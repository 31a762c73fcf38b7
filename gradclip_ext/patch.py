"""Swapping torch.nn.utils' clipping functions for these, for code one cannot edit."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.utils.clip_grad

from gradclip_ext import clip

_Place = tuple[ModuleType, str]

_REPLACEMENTS: dict[_Place, Callable[..., Any]] = {
    (torch.nn.utils, "clip_grad_norm_"): clip.clip_grad_norm_,
    (torch.nn.utils, "clip_grad_value_"): clip.clip_grad_value_,
    (torch.nn.utils, "clip_grads_with_norm_"): clip.clip_grads_with_norm_,
    (torch.nn.utils, "get_total_norm"): clip.get_total_norm,
    (torch.nn.utils.clip_grad, "clip_grad_norm_"): clip.clip_grad_norm_,
    (torch.nn.utils.clip_grad, "clip_grad_value_"): clip.clip_grad_value_,
    # Under these names other libraries import the two halves (verl's fsdp_utils, and copies of it).
    (torch.nn.utils.clip_grad, "_clip_grads_with_norm_"): clip.clip_grads_with_norm_,
    (torch.nn.utils.clip_grad, "_get_total_norm"): clip.get_total_norm,
}
# What was there before the first patch is kept in torch's module, where a reload of this one finds it. It is
# there for as long as the patch is.
_ORIGINALS = "_replaced_by_gradclip_ext"


_Functions = dict[_Place, Callable[..., Any]]


def _current() -> _Functions:
    return {(module, name): getattr(module, name) for module, name in _REPLACEMENTS}


def _install(functions: dict[_Place, Callable[..., Any]]) -> None:
    for (module, name), function in functions.items():
        setattr(module, name, function)


def _state() -> tuple[_Functions, _Functions | None]:
    """Return the functions in place, and those that a patch has replaced if there is one."""
    return _current(), vars(torch.nn.utils.clip_grad).get(_ORIGINALS)


def _patch() -> None:
    vars(torch.nn.utils.clip_grad).setdefault(_ORIGINALS, _current())
    _install(_REPLACEMENTS)


class _Patch:
    """What patch_torch returns: leaving its ``with`` block restores what was there before it."""

    def __init__(self) -> None:
        self._before = [_state()]
        self._entered = False
        _patch()

    def __enter__(self) -> _Patch:
        if self._entered:  # a second `with` on one object has a "before" of its own
            self._before.append(_state())
        self._entered = True
        _patch()
        return self

    def __exit__(self, *exception: object) -> None:
        functions, originals = self._before.pop()
        _install(functions)
        vars(torch.nn.utils.clip_grad).pop(_ORIGINALS, None)
        if originals is not None:
            vars(torch.nn.utils.clip_grad)[_ORIGINALS] = originals


def patch_torch() -> _Patch:
    """Replace torch.nn.utils' clipping functions by those of this package.

    Reaches code that looks the functions up in ``torch.nn.utils`` or
    ``torch.nn.utils.clip_grad`` when it calls them, as transformers, accelerate and
    Lightning do, also by the private names ``_get_total_norm`` and ``_clip_grads_with_norm_``.
    A name imported earlier with ``from torch.nn.utils import ...`` keeps pointing at torch's
    function.
    Idempotent and not counted: however often it was called, one :func:`unpatch_torch`
    restores torch.

    Returns:
        A context manager; leaving its ``with`` block restores what was there when it was
        entered. Without ``with`` the patch simply stays.

    Example:
        >>> with patch_torch():
        ...     torch.nn.utils.clip_grad_norm_ is clip_grad_norm_
        True
        >>> torch.nn.utils.clip_grad_norm_ is clip_grad_norm_
        False
    """
    return _Patch()


def unpatch_torch() -> None:
    """Put back the functions that the first :func:`patch_torch` replaced, however often it was called."""
    _install(vars(torch.nn.utils.clip_grad).pop(_ORIGINALS, {}))
