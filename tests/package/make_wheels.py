"""Makes the sdist, and from it the CPU wheels for upload, for x86_64 and aarch64 and for every CPython from
3.10 on that is found here.

The compiler is zig's clang from the package registry: it compiles for both processors and for an older glibc
than this machine's. .github/workflows/wheels.yml makes wheels for the same tags with the compiler of the
manylinux images, and tests them on both processors.

    --cuda    one more wheel, with CUDA kernels, for the running Python and by this machine's own compiler
    --record  write the sizes to benchmarks/results/wheels.json, which the README quotes
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import zipfile
from datetime import datetime, timezone
from pathlib import Path

from commands import run

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "build" / "wheel-tools"
OUT = ROOT / "dist"
RECORDS = ROOT / "benchmarks" / "results" / "wheels.json"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
ARCHITECTURES = ("x86_64", "aarch64")
GLIBC = (2, 28)
# Debian's own Pythons have one pyconfig.h per processor, in folders where zig does not look.
HAS_HEADERS = """
import pathlib, sysconfig
folder = pathlib.Path(sysconfig.get_path("include"))
found = (folder / "Python.h").is_file() and "-linux-gnu/" not in (folder / "pyconfig.h").read_text()
raise SystemExit(not found)
"""


def find_python(version: str) -> str | None:
    """Return a CPython of this version that has its headers: on PATH, or one of pyenv's."""
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
    for candidate in filter(None, candidates):
        try:  # pyenv's shims stand for versions that may not be there
            done = subprocess.run([candidate, "-c", HAS_HEADERS], capture_output=True, check=False)
        except OSError:
            continue
        if done.returncode == 0:
            return candidate
    return None


def make_sdist(tools: Path) -> Path:
    run(tools, "-m", "build", "--sdist", "--outdir", OUT, ROOT)
    (sdist,) = OUT.glob("*.tar.gz")
    return sdist


def make_wheel(python: object, sdist: Path, *options: str, **environment: str) -> Path:
    """Build one wheel and return it. The build is isolated, as a user's is."""
    folder = TOOLS / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    environment["GRADCLIP_EXT_TESTING"] = ""
    run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, *options, sdist, **environment)
    (wheel,) = folder.glob("*.whl")
    return Path(shutil.move(wheel, OUT / wheel.name))


def make_manylinux_wheel(python: str, version: str, architecture: str, sdist: Path, zig: str) -> Path:
    glibc = ".".join(map(str, GLIBC))
    tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{architecture}"
    suffix = f".cpython-{version.replace('.', '')}-{architecture}-linux-gnu.so"
    return make_wheel(
        python, sdist, f"--config-settings=--build-option=--plat-name={tag}",
        GRADCLIP_EXT_BUILD="cpu",
        CXX=f"{zig} c++ -target {architecture}-linux-gnu.{glibc}",
        LDFLAGS="-O3",  # without it, zig links a debug build of its C++ runtime
        SETUPTOOLS_EXT_SUFFIX=suffix,
    )  # fmt: skip


def check_tag(tools: Path, wheel: Path) -> None:
    """End the program unless auditwheel finds nothing in the wheel that its tag does not promise."""
    said = run(tools, "-m", "auditwheel", "show", wheel)
    found = re.search(r'platform\s+tag:\s+"manylinux_(\d+)_(\d+)_(\w+)"', said)
    fits = found is not None and (int(found[1]), int(found[2])) <= GLIBC and wheel.stem.endswith(found[3])
    if not fits:
        sys.exit(f"{said}\n{wheel.name} does not fit its tag")


def cuda_version(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        facts = archive.read("gradclip_ext/_build_info.py").decode()
    return re.findall(r"^CUDA = '(.*)'", facts, re.M)[0]


def first_line(*command: object) -> str:
    return run(*command).splitlines()[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    shutil.rmtree(OUT, ignore_errors=True)
    tools = TOOLS / "venv" / "bin" / "python"
    if not tools.is_file():  # zig compiles its C++ runtime for a minute when its files are new
        run(sys.executable, "-m", "venv", TOOLS / "venv")
    run(tools, "-m", "pip", "install", "--upgrade", "ziglang", "build", "twine", "auditwheel")
    zig = f"{tools} -m ziglang"
    commit = run("git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    records = []

    def add(file: Path, compiler: str | None) -> None:
        run(tools, "-m", "twine", "check", "--strict", file)
        size = file.stat().st_size
        print(f"{file.name}  {size / 1e3:.0f} kB", flush=True)
        origin = {"commit": commit, "date": date, "compiler": compiler}
        records.append({"file": file.name, "bytes": size, **origin})

    sdist = make_sdist(tools)
    add(sdist, None)
    compiler = f"zig {first_line(*zig.split(), 'version')}, {first_line(*zig.split(), 'c++', '--version')}"
    for version in VERSIONS:
        python = find_python(version)
        if python is None:
            print(f"no Python {version} with usable headers is on this machine: no wheels for it", flush=True)
            continue
        for architecture in ARCHITECTURES:
            wheel = make_manylinux_wheel(python, version, architecture, sdist, zig)
            check_tag(tools, wheel)
            add(wheel, compiler)
    if asked.cuda:
        wheel = make_wheel(sys.executable, sdist, GRADCLIP_EXT_BUILD="cuda")
        add(wheel, f"CUDA {cuda_version(wheel)}, {first_line('c++', '--version')}")
    if asked.record:
        RECORDS.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")


if __name__ == "__main__":
    main()
