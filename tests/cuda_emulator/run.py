"""Runs pytest with an emulated GPU: ``python tests/cuda_emulator/run.py ARGUMENTS`` builds what it needs.

README.md says what it tests. Needs a torch with CUDA, a build of the package for CUDA that links the
runtime dynamically, and the headers of their toolkit; no GPU.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
BUILT = HERE.parents[1] / "build" / "cuda_emulator"
SUPPORT = HERE.parent / "support"
sys.path[:0] = [str(SUPPORT), os.getcwd()]  # the working directory, as with `python -m pytest`

from toolkit import find_toolkit  # noqa: E402


def check_build() -> None:
    """Exit unless the package links the CUDA runtime dynamically, so that another library can replace it."""
    spec = importlib.util.find_spec("gradclip_ext._C")
    if spec is None or spec.origin is None:
        sys.exit("the CUDA emulator needs the compiled module: gradclip_ext._C is missing")
    dynamic = subprocess.run(
        ["readelf", "-d", spec.origin], capture_output=True, text=True, check=True
    ).stdout
    wanted = f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}"
    if f"[{wanted}]" not in dynamic:
        sys.exit(f"the CUDA emulator needs a module that links {wanted} dynamically, not {spec.origin}")


def build() -> Path:
    """Compile the emulated runtime under the file name of the driver, which torch loads."""
    toolkit = find_toolkit()
    if toolkit is None or torch.version.cuda is None:
        sys.exit(f"the CUDA emulator needs a toolkit (found {toolkit}) and a torch with CUDA")
    BUILT.mkdir(parents=True, exist_ok=True)
    library, versions = BUILT / "libcuda.so.1", BUILT / "versions"
    # Symbols with this version replace those of the real runtime, which provides all others.
    versions.write_text(f"libcudart.so.{torch.version.cuda.split('.')[0]} {{ global: cuda*; __cuda*; }};\n")
    flags = ["-std=c++20", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    includes = ["-I", HERE.parents[1] / "csrc", "-I", toolkit / "include"]
    linked = [f"-Wl,--version-script={versions}", "-ldl", "-o", library]
    subprocess.run(["g++", *flags, *includes, HERE / "runtime.cpp", *linked], check=True)
    return library


if __name__ == "__main__":
    check_build()
    preloaded = " ".join(filter(None, (str(build()), os.environ.get("LD_PRELOAD"))))
    path = os.pathsep.join(filter(None, (str(HERE), str(SUPPORT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "LD_PRELOAD": preloaded, "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-p", "emulated", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)
