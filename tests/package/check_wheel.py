"""One wheel under several releases of torch: ``python tests/package/check_wheel.py 2.6.0 2.10.0 newest``.

The wheel is built once, in isolation and without torch, as a user's pip does it. Every release of torch gets
a new environment, in which the tests of the public functions run on that file, from a copy of the tests, so
that the source folder cannot be taken for the installed package.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from commands import run

ROOT = Path(__file__).resolve().parents[2]
LEAST_TESTS = 500
# They take minutes, and are about kernels that are the same under every torch.
LEFT_OUT = ("test_accuracy.py", "large_worker.py", "test_properties.py")
# What does not depend on the release: the loop and hidden values of foreach; on 2.10 and later, how tensors
# are read on earlier ones, which are tested by themselves. Of torch.compile, AOT Autograd is enough.
LEFT_OUT_NAMES = "not blind and not loop and not columns and not inductor"
USES_THE_KERNELS = """
import torch, gradclip_ext
from gradclip_ext import _extension, backends
reason = backends.ALL["cpu"].why_unavailable(torch.device("cpu"))
assert reason is None, reason
print("torch", torch.__version__, "gradclip_ext from", gradclip_ext.__file__)
print("reads tensors by", "DLPack's exchange table" if _extension.C.CAN_READ else "Python")
"""


def build_wheel(folder: Path) -> Path:
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT,
        cwd=folder, GRADCLIP_EXT_BUILD="cpu",
    )  # fmt: skip
    (wheel,) = folder.glob("gradclip_ext-*.whl")
    return wheel


def copy_tests(folder: Path) -> None:
    leave = shutil.ignore_patterns("__pycache__", *LEFT_OUT)
    for name in ("api", "support"):
        shutil.copytree(ROOT / "tests" / name, folder / "tests" / name, ignore=leave)
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)


def check(version: str, wheel: Path, folder: Path) -> str:
    """Test the wheel in a new environment with this release of torch; return a line about it."""
    environment = folder / "environment"
    python = environment / "bin" / "python"
    torch = "torch" if version == "newest" else f"torch=={version}"
    run(sys.executable, "-m", "venv", environment, cwd=folder)
    # A cap that this machine's pip may have must not decide what the newest release is.
    needed = (torch, "numpy<2.4", "setuptools", "pytest", "pytest-xdist>=3.7", "hypothesis")
    run(python, "-m", "pip", "install", "--quiet", *needed, cwd=folder, PIP_CONSTRAINT=os.devnull)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=folder)
    print(run(python, "-c", USES_THE_KERNELS, cwd=folder), flush=True)
    tests = ("-m", "pytest", "-q", "-k", LEFT_OUT_NAMES, "tests/api")
    said = run(python, *tests, cwd=folder, GRADCLIP_EXT_BACKEND="")
    passed = re.findall(r"(\d+) passed", said)
    if not passed or int(passed[-1]) < LEAST_TESTS:
        sys.exit(f"{said}\nfewer than {LEAST_TESTS} tests passed under {torch}")
    shutil.rmtree(environment)
    return f"{torch}: {said.strip().splitlines()[-1]}"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build_wheel(folder)
        print(f"{wheel.name}, {wheel.stat().st_size / 1e3:.0f} kB", flush=True)
        copy_tests(folder)
        for version in sys.argv[1:]:
            print(check(version, wheel, folder), flush=True)


if __name__ == "__main__":
    main()
