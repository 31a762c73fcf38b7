"""Who is measured: torch.nn.utils, every backend of gradclip_ext, and other libraries if they are here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

import gradclip_ext
from benchmarks import peers
from benchmarks.operations import NAMES
from gradclip_ext import backends

BASELINE = "torch.nn.utils"
LOOP = f"{BASELINE}[loop]"
OURS = "gradclip_ext["


@dataclass(frozen=True)
class Implementation:
    """One way to clip.

    Args:
        name: the ``impl`` of a record.
        peer: True for what is not ours; it is judged by a wider budget (gate.py).
        functions: operation name to a function with torch.nn.utils' leading arguments; an
            operation that is not there gets a row that says so.
        version: of another library; None for torch and ours, which the machine block has.
        note: its limits, for people.
    """

    name: str
    peer: bool
    functions: Mapping[str, Callable[..., Any]]
    version: str | None = None
    note: str = ""


def available(device: torch.device) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Return what can be measured on this device by name, and for the rest the reason why not."""
    found = [
        Implementation(BASELINE, True, _functions(torch.nn.utils)),
        Implementation(LOOP, True, _functions(torch.nn.utils, foreach=False), note="one tensor at a time"),
    ]
    missing = {}
    for backend_name, backend in backends.ALL.items():
        name = f"{OURS}{backend_name}]"
        reason = backend.why_unavailable(device)
        if reason is None:
            found.append(Implementation(name, False, _functions(gradclip_ext, backend=backend_name)))
        else:
            missing[name] = reason
    for name, peer in peers.ALL.items():
        try:
            functions, version, note = peer(device)
            found.append(Implementation(name, True, functions, version, note))
        except peers.Missing as error:
            missing[name] = str(error)
        except ModuleNotFoundError as error:
            missing[name] = f"{error.name} is not installed"
        except Exception as error:  # a library built for another torch raises anything on import
            missing[name] = f"it cannot be imported: {type(error).__name__}: {error}"
    return {implementation.name: implementation for implementation in found}, missing


def default_names(names: Iterable[str]) -> list[str]:
    """Return what is measured unless --impls says otherwise: everything but the loop, which nobody picks."""
    return [name for name in names if name != LOOP]


def full_name(name: str) -> str:
    """Return the name in a record for the short one a person types: torch, loop or a backend's name."""
    short = {"torch": BASELINE, "loop": LOOP}
    if name in short:
        return short[name]
    return f"{OURS}{name}]" if name in backends.ALL else name


def _functions(module: ModuleType, **fixed: Any) -> dict[str, Callable[..., Any]]:
    return {name: partial(getattr(module, name), **fixed) for name in NAMES}
