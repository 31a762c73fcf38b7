"""A pytest plugin for the emulated GPU: leaves out what is too large for it. run.py loads it."""

from __future__ import annotations

import pytest

# Parts of test ids, and why those tests are not for the emulator. A GPU runs them all.
NOT_HERE = {
    "test_accuracy.py": "minutes a test; the kernels' accuracy is tested by test_cuda_emulated.py",
    "two_to_the_31_elements": "hours",
    "100_million_elements": "minutes",
    "test_a_sparse_embedding": "coalescing is a kernel of torch's that nothing stands in for",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for part, reason in NOT_HERE.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))
