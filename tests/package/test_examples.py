"""Every example is executed: the Python blocks of README.md and all docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from subprocesses import TESTS, run_python

import gradclip_ext

README = TESTS.parent / "README.md"
NO_TEST = "<!-- no-test -->"
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


def readme_blocks() -> list[Any]:
    """Return the Python blocks with their line numbers; one below ``<!-- no-test -->`` is skipped."""
    if not README.exists():
        return [pytest.param("", marks=pytest.mark.skip(reason="there is no README.md beside the tests"))]
    text = README.read_text(encoding="utf-8")
    params: list[Any] = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        above = text[: match.start()].rstrip().endswith(NO_TEST)
        marks = [pytest.mark.skip(reason=f"README.md says {NO_TEST}")] if above else []
        params.append(pytest.param(match[1], id=f"line {line}", marks=marks))
    return params


@pytest.mark.parametrize("code", readme_blocks())
def test_readme(code: str, tmp_path: Path) -> None:
    """Each block stands alone: a reader may paste any one of them."""
    script = tmp_path / "readme_block.py"
    script.write_text(code, encoding="utf-8")
    run_python(str(script), timeout=60)


def modules() -> list[Any]:
    """Return every module of the package; one that cannot be imported here is skipped with the reason."""
    params: list[Any] = [pytest.param(gradclip_ext, id="gradclip_ext")]
    for info in pkgutil.walk_packages(gradclip_ext.__path__, "gradclip_ext."):
        name = info.name
        if name.endswith(("._C", "._testing")):  # compiled
            continue
        try:
            params.append(pytest.param(importlib.import_module(name), id=name))
        except ImportError as error:
            skip = pytest.mark.skip(reason=f"{name} cannot be imported: {error}")
            params.append(pytest.param(None, id=name, marks=skip))
    return params


@pytest.mark.parametrize("module", modules())
def test_docstrings(module: ModuleType) -> None:
    public = {name: getattr(gradclip_ext, name) for name in gradclip_ext.__all__}
    result = doctest.testmod(module, extraglobs={**public, "torch": torch}, verbose=False)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples fail, see the output"


@pytest.mark.parametrize("name", [n for n in gradclip_ext.__all__ if not n.startswith("__")])
def test_every_public_function_is_documented(name: str) -> None:
    doc = getattr(gradclip_ext, name).__doc__
    assert doc and doc.splitlines()[0].endswith("."), "one imperative line comes first"
    if name != "unpatch_torch":
        assert "Example:" in doc and ">>>" in doc
