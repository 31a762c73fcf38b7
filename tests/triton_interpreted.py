"""A pytest plugin for running the suite on Triton's interpreter: what it cannot do, and its worst delay.

    TRITON_INTERPRET=1 python -m pytest tests -p triton_interpreted -k triton

with this folder on PYTHONPATH; test_triton.py does so. Nothing here changes what a kernel computes.
"""

from __future__ import annotations

import hypothesis
import pytest
from triton.runtime import interpreter

# Parts of test ids, and why those tests are not for the interpreter. Compiled code runs them all.
NOT_HERE = {
    "test_same_bits_as_torch[triton-cpu-bfloat16]": (
        "the interpreter truncates float32 to bfloat16 where compiled code rounds; the other tests of "
        "products hold it to 1 ulp"
    ),
    "test_float32_range[triton-cpu-bfloat16": "the interpreter takes subnormal bfloat16 for zero",
    "100_million_elements": "minutes, at a million elements a second",
    "two_to_the_31_elements": "half an hour, at a million elements a second",
    "test_every_element_of_a_long_list": "a minute; a list of 1,000 is in test_triton_kernels.py",
    "test_constant_gradients": "minutes, at a million elements a second",
    "test_sizes_around_powers_of_two": "half a minute; the borders of chunks are in test_triton_kernels.py",
}
HYPOTHESIS_EXAMPLES = 5


def pytest_configure() -> None:
    hypothesis.settings.register_profile("interpreted", max_examples=HYPOTHESIS_EXAMPLES, deadline=None)
    hypothesis.settings.load_profile("interpreted")
    _patch_language_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for part, reason in NOT_HERE.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


def _patch_language_once() -> None:
    """Halve the time of a launch.

    Triton puts its interpreter's functions into triton.language at a launch, and again whenever
    one kernel function calls another, at a millisecond each. The second kind is needed once, for
    the functions of Triton's own library: they see the language under another module name.
    """
    patched = set()

    def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        modules = self.fn.__globals__.values()
        sees = frozenset(
            m.__name__ for m in (interpreter.tl, interpreter.tl.core) if any(m is v for v in modules)
        )
        if interpreter.tl.__name__ not in sees and sees not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(sees)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
