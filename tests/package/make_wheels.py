"""Makes the CPU wheels for upload: every CPython from 3.10 on that is found here, x86_64 and aarch64.

The compiler is zig's clang from the registry, which compiles for another processor and for an older glibc
than this machine's. .github/workflows/wheels.yml makes the same wheels, and those for the Pythons missing
here, in the manylinux images.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from commands import run

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "build" / "wheel-tools"
OUT = ROOT / "dist"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
ARCHITECTURES = ("x86_64", "aarch64")
GLIBC = (2, 28)


def find_python(version: str) -> str | None:
    """Return a CPython of this version: on PATH, or one of pyenv's."""
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    for candidate in filter(None, candidates):
        try:  # pyenv's shims stand for versions that may not be there
            done = subprocess.run([candidate, "--version"], capture_output=True, check=False)
        except OSError:
            continue
        if done.returncode == 0:
            return candidate
    return None


def make(python: str, version: str, architecture: str, zig: Path) -> Path:
    """Build one wheel and return it."""
    glibc = ".".join(map(str, GLIBC))
    tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{architecture}"
    folder = TOOLS / f"{version}-{architecture}"
    shutil.rmtree(folder, ignore_errors=True)
    copy = folder / "copy"
    copy.mkdir(parents=True)
    tracked = run("git", "-C", ROOT, "ls-files").splitlines()
    for name in tracked:
        if name.startswith(("csrc/", "gradclip_ext/")) or "/" not in name:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    number = version.replace(".", "")
    run(
        python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, copy,
        "--config-settings=--build-option=--plat-name=" + tag,
        GRADCLIP_EXT_BUILD="cpu",
        CXX=f"{zig} -m ziglang c++ -target {architecture}-linux-gnu.{glibc}",
        LDFLAGS="-O3",  # without it, zig links a C++ runtime of its debug mode
        SETUPTOOLS_EXT_SUFFIX=f".cpython-{number}-{architecture}-linux-gnu.so",
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return Path(shutil.copy(wheel, OUT))


def main() -> None:
    shutil.rmtree(TOOLS, ignore_errors=True)
    OUT.mkdir(exist_ok=True)
    run(sys.executable, "-m", "venv", TOOLS / "venv")
    tools = TOOLS / "venv" / "bin" / "python"
    run(tools, "-m", "pip", "install", "--quiet", "ziglang", "twine", "auditwheel")
    for version in VERSIONS:
        python = find_python(version)
        if python is None:
            print(f"Python {version} is not on this machine: no wheel for it")
            continue
        for architecture in ARCHITECTURES:
            wheel = make(python, version, architecture, tools)
            run(tools, "-m", "twine", "check", "--strict", wheel)
            fits = run(tools, "-m", "auditwheel", "show", wheel)
            if f"manylinux_{GLIBC[0]}_{GLIBC[1]}_" not in fits and "manylinux_2_17_" not in fits:
                sys.exit(f"{fits}\n{wheel.name} does not fit its tag")
            print(f"{wheel.name}  {wheel.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
