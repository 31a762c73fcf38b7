"""The suite on Triton's interpreter, in a process of its own: the kernels on CPU tensors.

triton_interpreted.py says which tests are not for it, and why.
"""

from __future__ import annotations

import importlib.util
import re

import pytest
from subprocesses import run_with_triton
from toolkit import ROOT, TESTS


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
)
def test_suite_in_the_interpreter() -> None:
    """The tests that every backend must pass, and those of these kernels alone."""
    why_not = (
        "import torch; from gradclip_ext import backends; "
        "print(backends.ALL['triton'].why_unavailable(torch.device('cpu')) or '')"
    )
    reason = run_with_triton("-c", why_not, timeout=120, interpret=True).strip()
    if reason:
        pytest.skip(f"Triton's interpreter does not run here: {reason}")
    out = run_with_triton(
        *("-m", "pytest", TESTS, "-c", ROOT / "pyproject.toml", "-m", "triton and not gpu"),
        *("-p", "triton_interpreted", "-p", "no:cacheprovider", "-W", "ignore", "-rs"),
        *("--ignore-glob", "*benchmarks*"),
        timeout=1800,
        interpret=True,
    )
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed[1]) > 300, out
