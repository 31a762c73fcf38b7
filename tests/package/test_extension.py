"""Without a compiled module: the reason in the report, a warning if the build was to have one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from subprocesses import PACKAGE_ROOT, run_python

from gradclip_ext import _extension

if _extension.C is None:
    pytest.skip(f"needs the compiled module, but {_extension.REASON}", allow_module_level=True)


def import_in_a_new_process(build_info: str | None, *, fails: str | None) -> str:
    """Import the package with this _build_info.py; importing its module ``fails`` with an exception."""
    code = f"""
import importlib.abc, sys, types, warnings
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "gradclip_ext._C" and {fails!r}:
            raise {fails or "None"}
sys.meta_path.insert(0, Finder())
if {build_info!r} is None:
    sys.modules["gradclip_ext._build_info"] = None
else:
    info = sys.modules["gradclip_ext._build_info"] = types.ModuleType("_build_info")
    exec({build_info!r}, info.__dict__)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, gradclip_ext
    from gradclip_ext import _extension, backends, info as report
w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, 4.0])
assert gradclip_ext.clip_grad_norm_([w], 1.0) == 5.0
count = sum("gradclip_ext" in str(c.message) for c in caught)
print(_extension.C is not None, count, backends.ALL["cpu"].why_unavailable(torch.device("cpu")))
print(report.report())
try:
    gradclip_ext.clip_grad_norm_([w], 1.0, backend="cpu")
except RuntimeError as error:
    print("refused:", error)
"""
    return run_python("-c", code, timeout=120, GRADCLIP_EXT_BACKEND="")


MISSING = "ModuleNotFoundError('no _C', name='gradclip_ext._C')"


def test_a_module_that_is_there_is_used() -> None:
    out = import_in_a_new_process("CPU_REASON = None", fails=None)
    assert out.startswith("True 0 None\n") and "refused" not in out


def test_no_build_was_asked_for() -> None:
    out = import_in_a_new_process(None, fails=MISSING)
    assert out.startswith("False 0 ") and out.count("was not built (GRADCLIP_EXT_BUILD=none") >= 3, out


def test_a_compilation_that_failed() -> None:
    out = import_in_a_new_process("CPU_REASON = 'no C++ compiler was found'", fails=MISSING)
    assert out.startswith("False 1 ") and out.count("not built: no C++ compiler was found") >= 3, out
    assert "refused: backend='cpu' cannot handle cpu tensors" in out


def test_a_module_that_cannot_be_imported() -> None:
    out = import_in_a_new_process("CPU_REASON = None", fails="ImportError('undefined symbol')")
    assert out.startswith("False 1 ") and out.count("cannot be imported: undefined symbol") >= 3, out


def test_a_source_folder_that_shadows_the_installed_package(tmp_path: Path) -> None:
    """README's lines run in the checkout after ``pip install .``: Python finds the source folder first."""
    site, checkout = tmp_path / "site", tmp_path / "checkout"
    package = Path(PACKAGE_ROOT) / "gradclip_ext"
    shutil.copytree(package, site / "gradclip_ext", ignore=shutil.ignore_patterns("__pycache__"))
    record = site / "gradclip_ext-0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: gradclip_ext\nVersion: 0\n")
    files = [p for p in site.rglob("*") if p.is_file()]
    (record / "RECORD").write_text("".join(f"{p.relative_to(site)},,\n" for p in files))
    leave = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
    shutil.copytree(package, checkout / "gradclip_ext", ignore=leave)
    left = checkout / "gradclip_ext.egg-info"  # by a build in the checkout
    left.mkdir()
    (left / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: gradclip_ext\nVersion: 0\n")
    (left / "SOURCES.txt").write_text("setup.py\n")
    code = f"""
import sys
# An editable install of this checkout would find the module for any package of this name.
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
sys.path.insert(1, {str(site)!r})
from gradclip_ext import info
print(info.report())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    for said in (done.stdout, done.stderr):
        assert f"imports the source folder {checkout / 'gradclip_ext'}" in said, done.stdout + done.stderr
        assert str(site / "gradclip_ext") in said and "run Python in another folder" in said
