"""The CPU kernels compile with clang, too: for this machine, where they pass their tests, and for macOS.

zig's clang, from the package registry, compiles for both. Slow, needs the registry: -m installs.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from commands import run

TESTS = Path(__file__).parents[1]
MACHO_64 = b"\xcf\xfa\xed\xfe"
pytestmark = [
    pytest.mark.installs,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere, clang is the usual compiler"),
]


@pytest.fixture(scope="module")
def clang(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The command of a clang that compiles C++."""
    folder = tmp_path_factory.mktemp("zig")
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "ziglang")
    return f"{folder / 'bin' / 'python'} -m ziglang c++"


def pip(*command: object, **environment: str) -> str:
    return run(
        sys.executable,
        "-m",
        "pip",
        *command,
        "--no-build-isolation",
        "--no-deps",
        TESTS.parent,
        **environment,
    )


def test_the_kernels_pass_their_tests(clang: str, tmp_path: Path) -> None:
    # Without -O3 for the linker, zig links a debug build of its C++ runtime.
    made = {"CXX": clang, "LDFLAGS": "-O3", "GRADCLIP_EXT_BUILD": "cpu", "GRADCLIP_EXT_TESTING": "1"}
    pip("install", "--target", tmp_path, **made)
    tests = ["kernels/test_cpu_kernels.py", "api/test_get_total_norm.py", "api/test_clip_grad_norm.py"]
    # Through -c, because `python -m pytest` would import the build of the sources first.
    start = (
        "import sys; sys.path.pop(0); import gradclip_ext._C as C, pytest; "
        "print(C.__file__); sys.exit(pytest.main())"
    )
    options = ["-p", "no:cacheprovider", "-c", TESTS.parent / "pyproject.toml", "-k", "not foreach"]
    said = run(
        sys.executable, "-c", start, *options, *(TESTS / name for name in tests), PYTHONPATH=str(tmp_path)
    )
    assert " passed" in said and said.startswith(f"{tmp_path}/gradclip_ext/_C."), said


def test_a_wheel_for_macos(clang: str, tmp_path: Path) -> None:
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    environment = {
        "CXX": f"{clang} -target aarch64-macos.11.0",
        "GRADCLIP_EXT_BUILD": "cpu",
        "_PYTHON_HOST_PLATFORM": "macosx-11.0-arm64",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{version}-darwin.so",
    }
    pip("wheel", "--wheel-dir", tmp_path, **environment)
    (wheel,) = tmp_path.glob("*-macosx_11_0_arm64.whl")
    with zipfile.ZipFile(wheel) as archive:
        module = archive.read(f"gradclip_ext/_C{environment['SETUPTOOLS_EXT_SUFFIX']}")
    assert module.startswith(MACHO_64) and b"PyInit__C" in module
