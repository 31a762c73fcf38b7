"""Every documented way to install gives the compiled CPU kernels. Slow, needs the registry: -m installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import commands
import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.installs

# Run away from the checkout. torch is the one of this environment: no way to install here needs it.
USES_THE_KERNELS = """
import torch, gradclip_ext
from gradclip_ext import _extension, backends
assert backends.ALL["cpu"].why_unavailable(torch.device("cpu")) is None, _extension.REASON
w = torch.nn.Parameter(torch.zeros(2)); w.grad = torch.tensor([3.0, 4.0])
assert gradclip_ext.clip_grad_norm_([w], 1.0, backend="cpu") == 5.0
print(gradclip_ext.__file__)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files."""
    copy = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of a new environment, which sees this one's torch and nothing else that builds need."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    packages = Path(torch.__file__).parents[1]
    for name in os.listdir(packages):
        hidden = ("gradclip", "__editable__", "setuptools", "pybind11", "ninja", "pip", "_distutils", "wheel")
        if not name.startswith(hidden) and not (site / name).exists():
            (site / name).symlink_to(packages / name)
    return tmp_path / "venv" / "bin" / "python"


def run(*command: object, cwd: Path, build: str = "cpu") -> str:
    # -O0 takes half of the time, and the speed of kernels does not matter here.
    settings = {"GRADCLIP_EXT_BUILD": build, "TORCH_CUDA_ARCH_LIST": "9.0", "CXXFLAGS": "-O0"}
    return commands.run(*command, cwd=cwd, **settings)


def test_pip_install(checkout: Path, python: Path, tmp_path: Path) -> None:
    run(python, "-m", "pip", "install", "--no-deps", ".", cwd=checkout, build="auto")
    assert str(tmp_path / "venv") in run(python, "-c", USES_THE_KERNELS, cwd=tmp_path)
    said = run(python, "-m", "gradclip_ext.info", cwd=checkout)
    assert "imports the source folder" in said and str(tmp_path / "venv") in said


def test_pip_install_without_isolation(checkout: Path, python: Path, tmp_path: Path) -> None:
    run(python, "-m", "pip", "install", "setuptools>=77", "pybind11>=3.0", cwd=tmp_path)
    run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", ".", cwd=checkout)
    assert str(tmp_path / "venv") in run(python, "-c", USES_THE_KERNELS, cwd=tmp_path)


def test_pip_install_editable(checkout: Path, python: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    run(python, "-m", "pip", "install", "--no-deps", "-e", ".", cwd=copy)
    assert str(copy) in run(python, "-c", USES_THE_KERNELS, cwd=tmp_path)


def test_build_and_the_sdist(
    checkout: Path, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADCLIP_EXT_REPOSITORY", "https://example.org/some/name")
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", checkout, cwd=tmp_path)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size < 20_000_000
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith("/METADATA"))
        metadata = files.read(name).decode()
    assert "Project-URL: Source, https://example.org/some/name\n" in metadata
    assert "](https://example.org/some/name/raw/v" in metadata
    run(python, "-m", "pip", "install", "--no-deps", archive, cwd=tmp_path)
    assert str(tmp_path / "venv") in run(python, "-c", USES_THE_KERNELS, cwd=tmp_path)


def test_uv_pip_install(checkout: Path, python: Path, tmp_path: Path) -> None:
    run(python, "-m", "pip", "install", "uv", cwd=tmp_path)
    run(python, "-m", "uv", "pip", "install", "--python", python, "--no-deps", ".", cwd=checkout)
    assert str(tmp_path / "venv") in run(python, "-c", USES_THE_KERNELS, cwd=tmp_path)
