"""Who is measured: torch.nn.utils and every backend of gradclip_ext that works on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

import gradclip_ext
from benchmarks.operations import NAMES
from gradclip_ext import backends

BASELINE = "torch.nn.utils"


@dataclass(frozen=True)
class Implementation:
    """One way to clip.

    Args:
        name: the ``impl`` of a record.
        peer: True for what is not ours; it is judged by a wider budget (gate.py).
        functions: operation name to a function with torch.nn.utils' leading arguments.
    """

    name: str
    peer: bool
    functions: Mapping[str, Callable[..., Any]]


def _functions(module: ModuleType, **fixed: Any) -> dict[str, Callable[..., Any]]:
    return {name: partial(getattr(module, name), **fixed) for name in NAMES}


def available(device: torch.device) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Return what can be measured on this device by name, and for the rest the reason why not."""
    found = [
        Implementation(BASELINE, True, _functions(torch.nn.utils)),
        Implementation(f"{BASELINE}[loop]", True, _functions(torch.nn.utils, foreach=False)),
    ]
    missing = {}
    for backend_name, backend in backends.ALL.items():
        name = f"gradclip_ext[{backend_name}]"
        reason = backend.unusable(device)
        if reason is None:
            found.append(Implementation(name, False, _functions(gradclip_ext, backend=backend_name)))
        else:
            missing[name] = reason
    return {implementation.name: implementation for implementation in found}, missing


def default_names(names: list[str]) -> list[str]:
    """Return what is measured unless --impls says otherwise: everything but the loop, which nobody picks."""
    return [name for name in names if name != f"{BASELINE}[loop]"]


def full_name(name: str) -> str:
    """Return the name in a record for the short one a person types: torch, loop or a backend's name."""
    short = {"torch": BASELINE, "loop": f"{BASELINE}[loop]"}
    if name in short:
        return short[name]
    return f"gradclip_ext[{name}]" if name in backends.ALL else name
