"""Without the compiled module everything works as before, only slower."""

from __future__ import annotations

import re
import sys

import pytest
from subprocesses import TESTS, run_python

REPRESENTATIVE = (
    "api/test_clip_grad_value.py",
    "api/test_clip_grads_with_norm.py",
    "api/test_get_total_norm.py",
    "api/test_nonfinite.py",
    "api/test_bookkeeping.py",
    "api/test_shared_memory.py",
    "api/test_bad_gradients.py",
    "api/test_unusual_gradients.py",
    "distributed/test_layouts.py",
    "package/test_info.py",
)


def run_tests(*files: str) -> str:
    configuration = TESTS.parent / "pyproject.toml"
    arguments = ("-q", "-p", "no:cacheprovider", "-c", configuration, *(TESTS / file for file in files))
    return run_python("-m", "pytest", *map(str, arguments), timeout=240, GRADCLIP_EXT_TEST_WITHOUT_C="1")


@pytest.mark.skipif("gradclip_ext._C" not in sys.modules, reason="the compiled module is not there at all")
def test_the_public_functions_do_without_it() -> None:
    """The environment variable makes compiled_module.py hide the compiled module from the package."""
    out = run_tests(*REPRESENTATIVE)
    found = re.search(r"(\d+) passed", out)
    assert found is not None and int(found[1]) > 300, out
    assert "failed" not in out and "error" not in out


SCRIPT = """
import sys
sys.modules["gradclip_ext._C"] = None
import torch, gradclip_ext
from gradclip_ext import backends, info
assert backends.ALL["cpu"].why_unavailable(torch.device("cpu")) in info.report()
param = torch.nn.Parameter(torch.zeros(2))
param.grad = torch.tensor([3.0, 4.0])
print(gradclip_ext.clip_grad_norm_([param], 1.0).item())
"""


def test_info_says_why_it_is_missing() -> None:
    assert run_python("-W", "ignore", "-c", SCRIPT, timeout=60).split() == ["5.0"]
