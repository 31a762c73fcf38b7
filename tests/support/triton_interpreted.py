"""A pytest plugin for running the suite on Triton's interpreter: skips what it cannot do, and speeds it up.

    TRITON_INTERPRET=1 python -m pytest tests -p triton_interpreted -m "triton and not gpu"

with this folder on PYTHONPATH, as kernels/test_triton_interpreted.py does. It does not change what a kernel
computes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
from triton.runtime import interpreter

# Parts of test ids, and why the interpreter skips those tests. Compiled kernels run all of them.
SKIPPED = {
    "test_same_bits_as_torch[triton-cpu-bfloat16]": (
        "the interpreter truncates float32 to bfloat16 where compiled code rounds; the other tests of "
        "products hold it to 1 ulp"
    ),
    "test_vectors_scale_each_as_alone[triton-cpu-bfloat16]": (
        "a tensor with gaps goes to foreach, which rounds to bfloat16, and its copy without gaps does not"
    ),
    "test_as_one_call_for_each[triton-cpu-bfloat16--inf]": (
        "for a norm that foreach computes, it also scales each tensor, and rounds to bfloat16"
    ),
    **{
        f"test_as_one_call_for_each[triton-cpu-{dtype}-{norm_type}]": (
            "half a minute each; of these orders there are lists in test_triton_segment_kernels.py"
        )
        for dtype in ("float16", "bfloat16", "float32", "float64", "complex64")
        for norm_type in (0.5, 1.0, 3.0)
    },
    **{
        f"test_bits_at_powers_of_two[triton-cpu-{scale}-": "ten seconds each; the scale 1024 is run"
        for scale in ("65536.0", "1.0", "0.5", "0.0009765625")
    },
    "test_float32_range[triton-cpu-bfloat16": "the interpreter takes subnormal bfloat16 for zero",
    "test_get_grad_stats.py::test_many_chunks_and_threads[triton-cpu-3.0]": "a minute; of p = 1 it runs",
    "100_million_elements": "minutes, at a million elements a second",
    "two_to_the_31_elements": "half an hour, at a million elements a second",
    "test_every_element_of_a_long_list": "a minute; a list of 1,000 is in test_triton_kernels.py",
    "test_constant_gradients": "minutes, at a million elements a second",
    "test_sizes_around_powers_of_two": "half a minute; the borders of chunks are in test_triton_kernels.py",
}
HYPOTHESIS_EXAMPLES = 5
# Of a test of the public functions, so many cases are kept. The kernels' own tests run all dtypes and orders.
CASES = 6


def pytest_configure() -> None:
    hypothesis.settings.register_profile("interpreted", max_examples=HYPOTHESIS_EXAMPLES, deadline=None)
    hypothesis.settings.load_profile("interpreted")
    _patch_language_once()


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    keep_some_cases(config, items, CASES)
    for item in items:
        for part, reason in SKIPPED.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


def keep_some_cases(config: pytest.Config, items: list[pytest.Item], most: int) -> None:
    """Deselect cases of tests that have more of them, but for those in the folder of the kernels."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = set()
    for each in cases.values():
        step = 1 if each[0].path.parent.name == "kernels" else max(1, -(-len(each) // most))
        kept.update(each[::step])
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _patch_language_once() -> None:
    """Patch triton.language once, which makes the tests three times as fast.

    The interpreter replaces functions of triton.language by its own at every launch, and at every call of one
    kernel function by another, and restores them after the launch. That takes a millisecond each time. In a
    process that compiles nothing, its functions may stay.
    """
    patch, patched = interpreter._patch_lang, set()

    def patch_once(fn: Any) -> SimpleNamespace:
        # Triton's own functions refer to the language by another name than ours do.
        seen = frozenset(
            id(v) for v in fn.__globals__.values() if v is interpreter.tl or v is interpreter.tl.core
        )
        if seen not in patched:
            patch(fn)
            patched.add(seen)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once
