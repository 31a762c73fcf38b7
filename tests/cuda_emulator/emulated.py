"""A pytest plugin for the emulated GPU: skips the tests that are too large for it. run.py loads it."""

from __future__ import annotations

import pytest

# Parts of test ids, and why the emulator skips those tests. A GPU runs all of them.
SKIPPED = {
    "test_accuracy.py": "minutes a test; the kernels' accuracy is tested by test_cuda_emulated.py",
    "two_to_the_31_elements": "hours",
    "100_million_elements": "minutes",
    "test_a_sparse_embedding": "coalescing calls a kernel of torch's that is not emulated",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for part, reason in SKIPPED.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))
