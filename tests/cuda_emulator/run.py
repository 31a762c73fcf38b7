"""Runs pytest with an emulated GPU: ``python tests/cuda_emulator/run.py ARGUMENTS`` builds what it needs.

Needs a torch and a build of the package for CUDA, and the headers of their toolkit; no GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
BUILT = HERE.parents[1] / "build" / "cuda_emulator"
sys.path.insert(0, str(HERE.parent))

from toolkit import ROOT, find_toolkit  # noqa: E402


def build() -> Path:
    """Compile the runtime under the driver's name, by which torch asks for it."""
    toolkit = find_toolkit()
    if toolkit is None or torch.version.cuda is None:
        sys.exit(f"the CUDA emulator needs a toolkit (found {toolkit}) and a torch with CUDA")
    BUILT.mkdir(parents=True, exist_ok=True)
    library, versions = BUILT / "libcuda.so.1", BUILT / "versions"
    # Symbols of the same version come before those of the real runtime, which stays for the rest.
    versions.write_text(f"libcudart.so.{torch.version.cuda.split('.')[0]} {{ global: cuda*; __cuda*; }};\n")
    flags = ["-std=c++20", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    includes = ["-I", ROOT / "csrc", "-I", toolkit / "include"]
    linked = [f"-Wl,--version-script={versions}", "-ldl", "-o", library]
    subprocess.run(["g++", *flags, *includes, HERE / "runtime.cpp", *linked], check=True)
    return library


if __name__ == "__main__":
    preloaded = " ".join(filter(None, (str(build()), os.environ.get("LD_PRELOAD"))))
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "LD_PRELOAD": preloaded, "PYTHONPATH": path}
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:]], environment)
