"""A pytest plugin: the triton backend on the emulated GPU, its kernels interpreted in stream order.

    TRITON_INTERPRET=1 python tests/cuda_emulator/run.py \\
        -p triton_interpreted -p triton_emulated -m "gpu and triton"

test_triton_compiled.py, not this plugin, tests what Triton compiles and how that is launched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sitecustomize as emulated
import torch
from torch import Tensor
from triton_interpreted import keep_some_cases

from gradclip_ext.backends.triton import TritonBackend
from gradclip_ext.backends.triton.launch import Launch, Launcher

SKIPPED = {
    "threads": "deadlock: a thread that interprets holds the emulator's lock and waits for Python's",
    "test_same_bits_as_torch[triton-cuda-bfloat16]": "the interpreter truncates float32 to bfloat16",
    "agrees_with_the_other": "the interpreter truncates float32 to bfloat16",
    "test_vectors_scale_each_as_alone[triton-cuda-bfloat16]": "as above, and foreach beside it does not",
    "among_others[triton-700]": "minutes",
    "holds[triton-2329]": "minutes",
    "holds[triton-2330]": "minutes",
    "holds[triton-10000]": "an hour",
    "test_launches_of_a_long_list": "hours",
}

# Of each test, so many cases are kept.
CASES = 2

_why_unfit, _start_of = TritonBackend._why_unfit, Launcher._start_of


def _why_unfit_for_the_emulator(self: TritonBackend, device: torch.device) -> str | None:
    reason = _why_unfit(self, device)
    return None if reason is not None and "cannot read GPU memory" in reason else reason


def _enqueue_interpretation(self: Launcher, launch: Launch, changing: tuple[Any, ...]) -> Callable[..., None]:
    if not any(isinstance(a, Tensor) and a.is_cuda for a in launch.arguments):
        return _start_of(self, launch, changing)

    def start(*changing: Any) -> None:
        named = {**launch.constants, **launch.options}
        arguments = [
            emulated.on_cpu(a) if isinstance(a, Tensor) else a for a in (*changing, *launch.arguments)
        ]
        emulated.enqueue(lambda: launch.kernel[(launch.programs,)](*arguments, **named))

    return start


TritonBackend._why_unfit = _why_unfit_for_the_emulator  # type: ignore[method-assign]
Launcher._start_of = _enqueue_interpretation  # type: ignore[method-assign]


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a few cases of each test: all of them run on the CPU, by test_triton_interpreted.py.

    What is added here is streams, captures and devices, which do not depend on the dtype or the order.
    """
    keep_some_cases(config, items, CASES)
    for item in items:
        for part, reason in SKIPPED.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))
