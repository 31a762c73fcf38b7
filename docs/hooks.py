"""Brings sections of README.md and CONTRIBUTING.md into the pages, so that nothing is said twice.

A line ``{{ README.md: Install }}`` becomes what stands under that heading, without the heading itself. The
figures and examples that these sections link to become files of the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PLACEHOLDER = re.compile(r"^\{\{ (\S+): (.+?) \}\}$", re.MULTILINE)
# Where on the site a link within the repository leads.
LINKS = {
    "(#beside-other-tools)": "(frameworks/index.md)",
    "(#where-it-differs-from-torch)": "(accuracy.md)",
    "(#benchmarks)": "(benchmarks.md)",
    "(CONTRIBUTING.md#what-the-norm-costs-over-many-ranks)": "(sharded.md#what-travels)",
    "(benchmarks/results/README.md)": "(benchmarks/results/index.md)",
    "[examples/](examples)": "[examples](examples/by_norm.py)",
    "[CONTRIBUTING.md](CONTRIBUTING.md)": "[Design](design.md)",
    "[tests/cuda_emulator](tests/cuda_emulator/README.md)": "`tests/cuda_emulator`",
}


def section(file: str, heading: str) -> str:
    """Return what stands under a heading, up to the next one that is not below it."""
    text = (ROOT / file).read_text(encoding="utf-8")
    start = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    if start is None:
        raise KeyError(f"{file} has no heading {heading!r}")
    rest = text[start.end() :]
    end = re.search(rf"^#{{1,{max(2, len(start[1]))}}} ", rest, re.MULTILINE)
    return rest[: end.start() if end else None].strip()


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    text = PLACEHOLDER.sub(lambda found: section(found[1], found[2]), markdown)
    if text == markdown and page.file.src_uri != "benchmarks/results/index.md":
        return markdown
    for link, target in LINKS.items():
        text = text.replace(link, target)
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"\]\((?!https?:|#|\.\./)", f"]({up}", text) if up and text != markdown else text


def on_files(files: Any, config: Any) -> Any:
    for path in [*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/results/*")]:
        name = path.relative_to(ROOT).as_posix()
        if path.name == "README.md":
            name = name.replace("README", "index")
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_content(html: str, **kwargs: Any) -> str:
    """Docstrings mark up names and code as Sphinx does, which Markdown does not know."""
    html = re.sub(r":(?:func|meth|class|mod|attr):<code>~?", "<code>", html)
    return html.replace("::</p>", ":</p>")
