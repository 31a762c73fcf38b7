"""A compiled module that does not fit: not used, the reason in the report, one warning, foreach serves."""

from __future__ import annotations

import pytest
import torch
from subprocesses import run_python

from gradclip_ext import _core

if _core.C is None:
    pytest.skip(f"needs the compiled module, but {_core.REASON}", allow_module_level=True)


def import_in_a_new_process(build_info: str | None, *, hide: bool = False) -> str:
    """Import the package as if setup.py had written ``build_info``, clip with it and describe the backend."""
    code = f"""
import sys, types, warnings
if {build_info!r} is None or {hide!r}:
    sys.modules["gradclip_ext._C"] = None
if {build_info!r} is None:
    sys.modules["gradclip_ext._build_info"] = None
else:
    info = sys.modules["gradclip_ext._build_info"] = types.ModuleType("_build_info")
    exec({build_info!r}, info.__dict__)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, gradclip_ext
    from gradclip_ext import _core, backends, info as report
w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, 4.0])
assert gradclip_ext.clip_grad_norm_([w], 1.0) == 5.0
loaded = getattr(sys.modules.get("gradclip_ext._C"), "__name__", None)
count = sum("gradclip_ext" in str(c.message) for c in caught)
print(loaded, count, backends.ALL["cpu"].why_unavailable(torch.device("cpu")))
print(report.report())
try:
    gradclip_ext.clip_grad_norm_([w], 1.0, backend="cpu")
except RuntimeError as error:
    print("refused:", error)
"""
    return run_python("-c", code, timeout=120, GRADCLIP_EXT_BACKEND="")


def test_a_build_for_this_torch_is_used() -> None:
    out = import_in_a_new_process(f"TORCH = {torch.__version__!r}")
    assert out.startswith("gradclip_ext._C 0 None\n") and "refused" not in out


def test_a_build_for_another_torch_is_not_even_imported() -> None:
    out = import_in_a_new_process("TORCH = '1.0.0'")
    reason = f"built for torch 1.0.0, this is torch {torch.__version__}"
    assert out.startswith("None 1 ") and out.count(reason) >= 3, out
    assert "refused: backend='cpu' cannot serve cpu tensors" in out


def test_no_build_at_all_is_no_reason_to_warn() -> None:
    out = import_in_a_new_process(None)
    assert out.startswith("None 0 ") and out.count("not built") >= 3, out


def test_a_module_that_cannot_be_imported() -> None:
    out = import_in_a_new_process(f"TORCH = {torch.__version__!r}", hide=True)
    assert out.startswith("None 1 ") and out.count("cannot be imported") >= 3, out
