"""setup.py: what it chooses, and what it says and records when something cannot be built."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import gradclip_ext

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup_py() -> SimpleNamespace:
    """The functions of setup.py."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup_py"))


def executable(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_toolkit(folder: Path, nvcc: str = "") -> Path:
    executable(folder / "bin" / "nvcc", nvcc)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    return folder


# ---------------------------------------------------------------- choices


def test_the_toolkit_is_not_where_a_wrapper_of_nvcc_is(
    setup_py: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    executable(tmp_path / "wrapper" / "bin" / "nvcc")
    toolkit = fake_toolkit(tmp_path / "toolkit")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("CUDA_PATH", "")
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    assert setup_py.find_toolkit() == toolkit
    monkeypatch.setenv("PATH", str(tmp_path / "wrapper" / "bin"))
    monkeypatch.setenv("CUDA_PATH", str(toolkit))
    assert setup_py.find_toolkit() == toolkit
    monkeypatch.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "home")))
    assert setup_py.find_toolkit() == tmp_path / "home"


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        ("8.0+PTX 9.0a", "9.0", ["8.0+PTX", "9.0a"]),  # what is asked for is taken as it is
        ("", "9.0\n8.0\n9.0", ["8.0", "9.0+PTX"]),
        ("", "", ["8.0", "9.0+PTX", "12.0+PTX"]),
        ("", "10.3", ["8.0", "9.0+PTX", "12.0+PTX"]),  # a GPU that this toolkit does not know runs the PTX
        ("", "6.1\n8.0", ["8.0+PTX"]),  # one for which the kernels do not compile is left out
    ],
)
def test_architectures(
    setup_py: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    asked: str,
    gpus: str,
    expected: list[str],
) -> None:
    nvcc = executable(tmp_path / "nvcc", "echo compute_80 compute_90 compute_120")
    executable(tmp_path / "nvidia-smi", f"printf '{gpus}'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert setup_py.cuda_architectures(str(nvcc)) == expected


def test_an_unreadable_architecture_is_named(
    setup_py: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(setup_py.BuildError, match=r"holds 'Hopper'; entries look like 9\.0"):
        setup_py.cuda_architectures("nvcc")


# ---------------------------------------------------------------- builds


def build(
    folder: Path, *, root: Path = ROOT, check: bool = True, **environment: str
) -> tuple[str, dict[str, Any]]:
    """Run setup.py's build; return what it printed and the facts that it recorded."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", "--build-base", folder],
        cwd=root,
        # -O0: what is built here is loaded at most, and takes half of the time that way.
        env={**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0", "CXXFLAGS": "-O0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) is check, done.stdout
    (info,) = list(folder.glob("lib*/gradclip_ext/_build_info.py")) or [None]
    return done.stdout, {} if info is None else runpy.run_path(str(info))


def modules(folder: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in folder.glob("lib*/gradclip_ext/*.so"))


def compiler_without_python_h(folder: Path) -> str:
    says = "fatal error: Python.h: No such file or directory"
    return str(
        executable(folder / "cxx", f'case "$*" in *" -c "*) echo "{says}" >&2; exit 1;; esac; exec g++ "$@"')
    )


def test_a_compilation_that_fails_is_recorded_and_the_rest_is_built(tmp_path: Path) -> None:
    toolkit = fake_toolkit(
        tmp_path / "toolkit", 'case "$*" in *-c*) echo "error: no such thing"; exit 1;; esac'
    )
    compiler = compiler_without_python_h(tmp_path)
    said, facts = build(tmp_path / "a", CXX=compiler, CUDA_HOME=str(toolkit), GRADCLIP_EXT_BUILD="auto")
    assert modules(tmp_path / "a") == []
    assert "Python.h: No such file" in facts["CPU_REASON"] and facts["CUDA_REASON"]
    assert "building without cuda" in said and "building without cpu" in said


@pytest.mark.installs
def test_a_failing_nvcc_leaves_the_cpu_kernels(tmp_path: Path) -> None:
    toolkit = fake_toolkit(
        tmp_path / "toolkit", 'case "$*" in *-c*) echo "error: no such thing"; exit 1;; esac'
    )
    _, facts = build(tmp_path / "a", CUDA_HOME=str(toolkit), GRADCLIP_EXT_BUILD="auto")
    assert "_C" in modules(tmp_path / "a") and facts["CPU_REASON"] is None and facts["CUDA"] is None
    assert "no such thing" in facts["CUDA_REASON"]


def test_no_compiler_and_no_toolkit(tmp_path: Path) -> None:
    said, facts = build(tmp_path / "a", CXX="no-such-compiler", CUDA_HOME="", GRADCLIP_EXT_BUILD="auto")
    assert modules(tmp_path / "a") == [] and "no C++ compiler was found" in facts["CPU_REASON"]
    assert "no C++ compiler was found" in said


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_a_mode_that_was_asked_for_insists(tmp_path: Path, mode: str) -> None:
    compiler = compiler_without_python_h(tmp_path)
    said, _ = build(
        tmp_path / "a", check=False, CXX=compiler, GRADCLIP_EXT_BUILD=mode, CUDA_HOME=str(tmp_path)
    )
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"GRADCLIP_EXT_BUILD={mode} cannot be built: "), said
    assert "Traceback" not in said


def test_an_unknown_mode_is_named(tmp_path: Path) -> None:
    said, _ = build(tmp_path / "a", check=False, GRADCLIP_EXT_BUILD="gpu")
    assert said.strip() == "GRADCLIP_EXT_BUILD='gpu' is not one of auto, cuda, cpu, none"


def test_old_setuptools_are_told_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "setuptools" / "command").mkdir(parents=True)
    (tmp_path / "setuptools" / "__init__.py").write_text("__version__ = '65.5.0'\n")
    for name in ("__init__", "build_ext", "build_py"):
        (tmp_path / "setuptools" / "command" / f"{name}.py").write_text(f"class {name}: pass\n")
    said, _ = build(tmp_path / "a", check=False, PYTHONPATH=str(tmp_path))
    assert "needs setuptools 77 or later to be built, this is 65.5.0" in said and len(said.splitlines()) == 1


@pytest.mark.installs
def test_a_second_build_compiles_what_has_changed(tmp_path: Path) -> None:
    pytest.importorskip("ninja", reason="without ninja, everything is compiled again")
    copy = tmp_path / "copy"
    for name in ("csrc", "gradclip_ext"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "_build_info.py"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)

    def built() -> dict[str, float]:
        build(tmp_path / "a", root=copy, GRADCLIP_EXT_BUILD="cpu")
        return {path.name: path.stat().st_mtime for path in (tmp_path / "a").glob("temp*/*.o")}

    before = built()
    assert built() == before
    header = copy / "csrc" / "python" / "threads.h"  # two files include it
    header.write_text(header.read_text() + "// changed\n")
    after = built()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"python_module.cpp.o", "python_threads.cpp.o"}


# ---------------------------------------------------------------- metadata


def test_without_the_address_of_the_repository_the_readme_is_as_it_is(
    setup_py: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRADCLIP_EXT_REPOSITORY", raising=False)
    metadata = setup_py.metadata()
    assert metadata["long_description"] == (ROOT / "README.md").read_text() and not metadata["project_urls"]


def test_links_as_a_package_index_needs_them(
    setup_py: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them absolute, to files that are there, and nothing else of README changed."""
    monkeypatch.setenv("GRADCLIP_EXT_REPOSITORY", "https://example.org/Some/name/")
    readme = (ROOT / "README.md").read_text()
    metadata = setup_py.metadata()
    here = f"https://example.org/Some/name/(blob|raw)/v{gradclip_ext.__version__}/"
    for kind, picture, file in re.findall(rf"(!?)\[[^][]*\]\({here}([^)#]+)", metadata["long_description"]):
        assert (ROOT / file).exists() and picture == ("raw" if kind else "blob"), file
    links = re.findall(
        r"\]\(([^)]*)\)", re.sub(r"```.*?```", "", metadata["long_description"], flags=re.DOTALL)
    )
    assert links and not [link for link in links if not link.startswith("https://")]
    back = re.sub(here, "", metadata["long_description"])
    assert back.replace("](README.md#", "](#") == readme
    assert metadata["project_urls"]["Source"] == "https://example.org/Some/name"
    assert metadata["project_urls"]["Documentation"] == "https://some.github.io/name/"


@pytest.mark.installs
def test_nothing_stale_gets_into_a_build(tmp_path: Path) -> None:
    """What an earlier build in the same folder left is removed, also where nothing can be built now."""
    build(tmp_path / "a", GRADCLIP_EXT_BUILD="cpu")
    assert "_C" in modules(tmp_path / "a")
    _, facts = build(tmp_path / "a", GRADCLIP_EXT_BUILD="auto", CXX="no-such-compiler")
    assert modules(tmp_path / "a") == [] and facts["CPU_REASON"]


@pytest.mark.installs
def test_the_module_needs_neither_torch_nor_a_cuda_runtime(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ImportError('hidden by the test')\n")
    build(tmp_path / "a", GRADCLIP_EXT_BUILD="cpu", PYTHONPATH=str(hidden), CXXFLAGS="")
    (module,) = (tmp_path / "a").glob("lib*/gradclip_ext/_C*.so")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True
    ).stdout
    assert not [line for line in symbols.splitlines() if "torch" in line or "c10" in line or "2at" in line]
    linked = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
    assert "torch" not in linked and "c10" not in linked and "cudart" not in linked, linked
    assert module.stat().st_size < 1_000_000
    headers = [p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert headers and not [
        p for p in headers for line in p.read_text().splitlines()
        if line.startswith("#include") and any(name in line for name in ("torch/", "ATen", "c10"))
    ]  # fmt: skip
