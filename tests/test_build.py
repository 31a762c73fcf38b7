"""What setup.py decides, and that the wheel and the sdist install and import somewhere else."""

import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ["setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"]
SHIPPED += ["CONTRIBUTING.md", "Makefile", ".clang-format"]
IMPORT_TEST = (
    "import torch, gradclip_ext as g; w = torch.nn.Parameter(torch.zeros(2)); "
    "w.grad = torch.tensor([3.0, 4.0]); assert g.clip_grad_norm_([w], 1.0) == 5.0; print(g.__file__)"
)


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py, its call of setup() left out."""
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    monkeypatch.setenv("GRADCLIP_EXT_BUILD", "none")
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources without what builds and tests left behind."""
    copy = tmp_path_factory.mktemp("checkout")
    leave = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__", "out")
    for folder in ("gradclip_ext", "csrc", "benchmarks", "tests"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, ignore=leave)
    for name in SHIPPED:
        shutil.copy(ROOT / name, copy / name)
    return copy


def run(*command, cwd, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), **environment},
        capture_output=True,
        check=False,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def executable(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def fake_toolkit(folder):
    executable(folder / "bin" / "nvcc")
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()


def test_the_toolkit_is_not_where_a_wrapper_of_nvcc_is(setup_py, monkeypatch, tmp_path):
    executable(tmp_path / "wrapper" / "bin" / "nvcc")
    fake_toolkit(tmp_path / "toolkit")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("CUDA_PATH", "")
    monkeypatch.setenv("PATH", str(tmp_path / "wrapper" / "bin"))
    assert setup_py.find_toolkit() != tmp_path / "wrapper"
    monkeypatch.setenv("PATH", str(tmp_path / "toolkit" / "bin"))
    assert setup_py.find_toolkit() == tmp_path / "toolkit"


@pytest.mark.parametrize(("release", "wanted", "fits"), [("12.4", "13.0", False), ("13.1", "13.0", True)])
def test_a_toolkit_of_another_major_version_is_an_obstacle(
    setup_py, monkeypatch, tmp_path, release, wanted, fits
):
    fake_toolkit(tmp_path)
    (tmp_path / "bin" / "nvcc").write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V1\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    obstacle = setup_py.toolkit_obstacle(wanted)
    assert (obstacle == "") is fits
    assert fits or (f"CUDA {release}" in obstacle and wanted in obstacle and str(tmp_path) in obstacle)


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        ("8.0+PTX", [(9, 0)], "8.0+PTX"),  # what is asked for is never argued with
        (None, [(9, 0), (8, 0), (9, 0)], "8.0;9.0"),
        (None, [], "8.0;9.0+PTX"),
        (None, [(12, 0)], "8.0;9.0+PTX"),  # a GPU that this toolkit does not know gets the PTX
        (None, [(6, 1), (9, 0)], "9.0"),  # one for which the kernels do not compile is left out
        (None, [(6, 1)], "8.0;9.0+PTX"),
    ],
)
def test_architectures(setup_py, monkeypatch, tmp_path, asked, gpus, expected):
    fake_toolkit(tmp_path)
    (tmp_path / "bin" / "nvcc").write_text("#!/bin/sh\necho compute_80 compute_90\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(gpus))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: gpus[index])
    if asked is None:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    else:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert setup_py.cuda_architectures() == expected


def test_cuda_home_comes_first(setup_py, monkeypatch, tmp_path):
    fake_toolkit(tmp_path / "path")
    fake_toolkit(tmp_path / "home")
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py.find_toolkit() == tmp_path / "home"


def test_an_unknown_mode_is_named(setup_py, monkeypatch):
    monkeypatch.setenv("GRADCLIP_EXT_BUILD", "gpu")
    with pytest.raises(SystemExit, match=r"'gpu' is not one of auto, cuda, cpu, none"):
        setup_py.choose_mode()


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_a_mode_that_was_asked_for_needs_torch(setup_py, monkeypatch, mode):
    monkeypatch.setenv("GRADCLIP_EXT_BUILD", mode)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=rf"{mode} cannot be built: torch is not installed"):
        setup_py.choose_mode()


def test_cpu_without_a_compiler_says_so(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADCLIP_EXT_BUILD", "cpu")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=r"cpu cannot be built: no C\+\+ compiler was found"):
        setup_py.choose_mode()


def test_cuda_needs_a_torch_built_with_it(setup_py, monkeypatch):
    monkeypatch.setenv("GRADCLIP_EXT_BUILD", "cuda")
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(SystemExit, match=r"torch .* is built without CUDA"):
        setup_py.choose_mode()


def test_auto_builds_what_it_can_and_says_what_it_leaves_out(setup_py, monkeypatch, capsys):
    monkeypatch.setenv("GRADCLIP_EXT_BUILD", "auto")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert setup_py.choose_mode() == "none"
    said = capsys.readouterr().err
    assert "building without cuda" in said
    assert "building without cpu" in said


def test_the_wheel_installs_and_imports_in_another_folder(checkout, tmp_path):
    no_core = {"GRADCLIP_EXT_BUILD": "none"}
    (checkout / "gradclip_ext" / "_build_info.py").write_text("TORCH = 'of an editable install'\n")
    run(
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        tmp_path,
        ".",
        cwd=checkout,
        **no_core,
    )
    (wheel,) = tmp_path.glob("gradclip_ext-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "gradclip_ext/py.typed" in names
    assert "gradclip_ext/_build_info.py" not in names
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "csrc"))]
    site = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    assert str(site) in run("-c", IMPORT_TEST, cwd=tmp_path, PYTHONPATH=str(site))


def test_the_sdist_builds_and_imports_in_an_empty_folder(checkout, tmp_path):
    run("-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, cwd=checkout)
    (archive,) = tmp_path.glob("gradclip_ext-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    sources = {str(p.relative_to(checkout)) for p in checkout.glob("csrc/**/*") if p.is_file()}
    assert sources <= names
    assert "gradclip_ext/_build_info.py" not in names
    site = tmp_path / "site"
    options = ("--no-build-isolation", "--no-deps", "--target", site)
    run("-m", "pip", "install", *options, archive, cwd=tmp_path, GRADCLIP_EXT_BUILD="none")
    assert str(site) in run("-c", IMPORT_TEST, cwd=tmp_path, PYTHONPATH=str(site))


def test_an_isolated_build_without_torch_gives_a_wheel_that_works(checkout, tmp_path):
    # What `pip install .` does where the build environment holds setuptools and nothing else.
    hide_torch = tmp_path / "hidden"
    hide_torch.mkdir()
    (hide_torch / "torch.py").write_text("raise ImportError('hidden by the test')\n")
    said = run(
        "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", tmp_path, ".",
        cwd=checkout, PYTHONPATH=str(hide_torch),
    )  # fmt: skip
    assert "building without cpu: torch is not installed in the build environment" in said
    (wheel,) = tmp_path.glob("gradclip_ext-*.whl")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]
    site = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    assert str(site) in run("-c", IMPORT_TEST, cwd=tmp_path, PYTHONPATH=str(site))
