"""Every page of the documentation: its code runs, and what it brings in from README.md exists."""

from __future__ import annotations

import importlib.util
import re
import socket
from pathlib import Path

import pytest
from subprocesses import TESTS, run_python

DOCS = TESTS.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
REQUIRES = re.compile(r"\A---\nrequires: (.+)\n---\n")
PLACEHOLDER = re.compile(r"^\{\{ (\S+): (.+?) \}\}$", re.MULTILINE)

pytestmark = pytest.mark.skipif(not PAGES, reason="there is no documentation beside the tests")


def code_of(page: Path) -> str:
    return "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", list(filter(code_of, PAGES)), ids=name_of)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    """All blocks of a page one after the other; those of a framework where it is installed."""
    requires = REQUIRES.match(page.read_text(encoding="utf-8"))
    for module in requires[1].split(", ") if requires else ():
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    script = tmp_path / "page.py"
    script.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{code_of(page)}", encoding="utf-8")
    with socket.socket() as free:  # for pages that a launcher would run, as one process of one
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    run_python(str(script), timeout=120, MASTER_PORT=port, DS_ACCELERATOR="cpu", **launched)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_sections_that_a_page_brings_in_exist(page: Path) -> None:
    for file, heading in PLACEHOLDER.findall(page.read_text(encoding="utf-8")):
        text = (DOCS.parent / file).read_text(encoding="utf-8")
        assert re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE), f"{file}: no heading {heading}"
