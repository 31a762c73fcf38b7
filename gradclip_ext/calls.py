"""What this process called: counted by what handled it, and a row each while a profiler runs."""

from __future__ import annotations

import atexit
import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import profiler

from gradclip_ext.backends import Selection
from gradclip_ext.gradient_list import GradientList

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

# Calls of each function, by what handled them. Two threads at once may lose a count: a lock would have to be
# right across fork, too.
_counts: dict[tuple[str, str], int] = {}

REPORT_VARIABLE = "GRADCLIP_EXT_REPORT"


def profiled(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Make each call of a public function a row of torch.profiler (or, under emit_nvtx, an NVTX range)."""
    return profiled_as(function.__name__)(function)


def profiled_as(name: str) -> Callable[[Callable[_Args, _Result]], Callable[_Args, _Result]]:
    """As :func:`profiled`, under the name of a public function: that under which its calls are counted."""
    row = f"gradclip_ext::{name}"

    def decorate(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
        @functools.wraps(function)
        def call(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
            if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:
                return function(*args, **kwargs)
            with profiler.record_function(row):
                return function(*args, **kwargs)

        return call

    return decorate


def count(function: str, gradients: GradientList | None, selection: Selection) -> None:
    """Count one call of a public function, whose gradients were read as this list (None: torch's function
    handles them). A call that torch.compile traces is not counted: it runs later, any number of times."""
    if torch.compiler.is_compiling():
        return
    key = function, _handled_by(gradients, selection)
    _counts[key] = _counts.get(key, 0) + 1


def _handled_by(gradients: GradientList | None, selection: Selection) -> str:
    if gradients is None:
        return "torch.nn.utils: a tensor subclass that dispatches by itself"
    parts = [
        name if name != "foreach" else f"foreach: {selection.why_foreach(device)}"
        for name, device in gradients.handled_by()
    ]
    if len(parts) == 1:
        return parts[0]
    return ", ".join(dict.fromkeys(parts)) or "nothing: no gradients"


def report() -> str:
    """Return a line for each function and what handled its calls, with their number."""
    if not _counts:
        return "calls        none in this process"
    lines = [f"  {number:>9}  {function:<24} {how}" for (function, how), number in sorted(_counts.items())]
    return "\n".join(["calls", *lines])


@functools.cache
def report_at_exit() -> None:
    """Print the report of this process to stderr when Python exits; asked for twice, once."""
    atexit.register(_print_report)


def _print_report() -> None:
    from gradclip_ext import info  # noqa: PLC0415  (which imports this module)

    rank = os.environ.get("RANK", "0")
    print(f"gradclip_ext in process {os.getpid()}, rank {rank}\n{info.use()}", file=sys.stderr)


if os.environ.get(REPORT_VARIABLE) == "1":
    report_at_exit()
