"""Every example is executed: the scripts under examples/, which README.md quotes, and all docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path
from textwrap import indent
from types import ModuleType
from typing import Any

import pytest
import torch
from subprocesses import TESTS

import gradclip_ext

README = TESTS.parent / "README.md"
EXAMPLES = sorted((TESTS.parent / "examples").glob("*.py"))
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")  # a process would import torch for seconds
    assert "epoch  90" in capsys.readouterr().out


@pytest.mark.skipif(not README.exists(), reason="there is no README.md beside the tests")
def test_readme_quotes_the_examples() -> None:
    """Each Python block of README.md is a run of lines of an example, whatever their indentation there."""
    quotes = FENCE.findall(README.read_text(encoding="utf-8"))
    assert len(quotes) >= len(EXAMPLES)
    for quote in quotes:
        assert any(is_quoted(quote, path.read_text(encoding="utf-8")) for path in EXAMPLES), (
            f"no file under examples/ has these lines of README.md:\n{quote}"
        )


def is_quoted(quote: str, text: str) -> bool:
    """Tell whether the lines occur in the text, all indented by the same number of levels.

    A line "..." stands for any number of lines.
    """
    for level in (0, 4, 8):
        parts = re.split(r"^\s*\.\.\.\n", indent(quote, level * " "), flags=re.MULTILINE)
        if re.search(r"\n" + r"(?:.*\n)?".join(map(re.escape, parts)), text, re.DOTALL):
            return True
    return False


def test_a_changed_quote_is_noticed() -> None:
    text = "\nfor x in y:\n    first(x)\n    second(x)\n    third(x)\nlast(x)\n"
    assert is_quoted("first(x)\nsecond(x)\n", text)
    assert is_quoted("for x in y:\n    first(x)\n", text)
    assert is_quoted("for x in y:\n...\n    third(x)\n...\nlast(x)\n", text)
    assert not is_quoted("first(x)\nthird(x)\n", text)
    assert not is_quoted("third(x)\n...\nfirst(x)\n", text)
    assert not is_quoted("rst(x)\n", text)


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
    if name not in ("unpatch_torch", "ClampHandle", "ClipHandle", "TorchPatch"):  # shown where they are made
        assert "Examples:" in doc and ">>>" in doc
