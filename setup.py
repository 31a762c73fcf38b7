"""Chooses the extension to build: its sources, flags and CUDA toolkit. Metadata is in pyproject.toml.

GRADCLIP_EXT_BUILD=auto|cuda|cpu|none (default auto): auto builds what torch, the compiler and
the toolkit allow and says what it left out; a choice that cannot be built is an error.
CUDA sources depend on a toolkit being installed, never on a GPU being visible.
TORCH_CUDA_ARCH_LIST and MAX_JOBS are respected; without the first, the visible GPUs decide, and
without any, all architectures below that the toolkit knows, with PTX for what comes after them.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MODES = ("auto", "cuda", "cpu", "none")
OLDEST_CAPABILITY = (7, 0)
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def find_toolkit():
    """Return the CUDA toolkit's folder, or None. An nvcc on PATH may be a wrapper far away from it."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [Path(nvcc).resolve().parents[1]] if nvcc else []
    candidates += ["/usr/local/cuda", "/opt/cuda"]
    for folder in map(Path, filter(None, candidates)):
        if (folder / "include" / "cuda_runtime.h").is_file() and (folder / "bin" / "nvcc").is_file():
            return folder
    return None


def find_compiler():
    return shutil.which(os.environ.get("CXX", "").split(" ")[0] or "c++") or shutil.which("g++")


def obstacles():
    """Return {mode: what is missing for it}, an empty string where nothing is."""
    try:
        import torch
    except ImportError:
        missing = "torch is not installed in the build environment (pip install --no-build-isolation .)"
        return {"cpu": missing, "cuda": missing}
    cpu = ""
    if not sys.platform.startswith("linux"):
        cpu = f"the compiled core is built on Linux only, this is {sys.platform}"
    elif find_compiler() is None:
        cpu = "no C++ compiler was found (looked for $CXX, c++ and g++)"
    cuda = cpu
    if not cuda and torch.version.cuda is None:
        cuda = f"torch {torch.__version__} is built without CUDA"
    return {"cpu": cpu, "cuda": cuda or toolkit_obstacle(torch.version.cuda)}


def toolkit_obstacle(wanted):
    """Return why the CUDA toolkit cannot serve a torch built for this version of CUDA, or ""."""
    toolkit = find_toolkit()
    if toolkit is None:
        return "no CUDA toolkit was found (CUDA_HOME, nvcc on PATH, /usr/local/cuda): set CUDA_HOME"
    release = nvcc_says("--version", r"release ([\d.]+)")
    if release and release[0].split(".")[0] != wanted.split(".")[0]:
        return (
            f"torch is built for CUDA {wanted} and the toolkit in {toolkit} is CUDA {release[0]}: "
            "set CUDA_HOME to one of the same major version"
        )
    return ""


def nvcc_says(option, pattern):
    """Return all that a pattern finds in what the toolkit's compiler prints."""
    command = [find_toolkit() / "bin" / "nvcc", option]
    return re.findall(pattern, subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def cuda_architectures():
    """Return what to compile for: TORCH_CUDA_ARCH_LIST, else the visible GPUs, else all in use today.

    Both as far as the toolkit and torch know them, with PTX for a GPU that is later than that.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if asked:
        return asked
    import torch
    from torch.utils import cpp_extension

    def is_known(architecture):
        with mock.patch.dict(os.environ, TORCH_CUDA_ARCH_LIST=architecture):
            try:
                return cpp_extension._get_cuda_arch_flags() != []
            except ValueError:
                return False

    digits = nvcc_says("--list-gpu-arch", r"compute_(\d+)")
    known = [a for a in ARCHITECTURES if a.replace(".", "") in digits and is_known(a)]
    gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    # Older ones, beside a newer one or alone, are left to the other backends: they lack instructions.
    visible = [f"{major}.{minor}" for major, minor in sorted(gpus) if (major, minor) >= OLDEST_CAPABILITY]
    if visible and all(v.replace(".", "") in digits and is_known(v) for v in visible):
        return ";".join(visible)
    return ";".join(known) + "+PTX"


def choose_mode():
    """Return "cuda", "cpu" or "none", or exit with what the asked-for mode lacks."""
    asked = os.environ.get("GRADCLIP_EXT_BUILD", "auto")
    if asked not in MODES:
        sys.exit(f"GRADCLIP_EXT_BUILD={asked!r} is not one of {', '.join(MODES)}")
    if asked == "none":
        return "none"
    missing = obstacles()
    if asked != "auto":
        if missing[asked]:
            sys.exit(f"GRADCLIP_EXT_BUILD={asked} cannot be built: {missing[asked]}")
        return asked
    for mode in ("cuda", "cpu"):
        if not missing[mode]:
            return mode
        print(f"gradclip_ext: building without {mode}: {missing[mode]}", file=sys.stderr)
    return "none"


class BuildPy(build_py):
    """Leaves out the _build_info.py of an editable install: a wheel gets its own, or has no core."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[1] != "_build_info"]


def extension(mode):
    """Return setup()'s arguments for the extension module of this mode."""
    if mode == "none":
        return {"cmdclass": {"build_py": BuildPy}}
    sources = {*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")}
    architectures = None
    if mode == "cuda":
        sources |= {*ROOT.glob("csrc/cuda/*.cu")}
        os.environ["CUDA_HOME"] = str(find_toolkit())  # cpp_extension reads both when it is imported
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures = cuda_architectures()
    else:
        sources -= {*ROOT.glob("csrc/*_cuda.cpp")}
    import torch
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self):
            """Build, then record beside the binary what it fits: checked before it is imported."""
            super().run()
            folder = Path(self.get_ext_fullpath("gradclip_ext._C")).parent
            cuda = torch.version.cuda if mode == "cuda" else None
            facts = {"TORCH": torch.__version__, "CUDA": cuda, "ARCHITECTURES": architectures}
            lines = (f"{name} = {value!r}\n" for name, value in facts.items())
            (folder / "_build_info.py").write_text("".join(lines))

    make = cpp_extension.CUDAExtension if mode == "cuda" else cpp_extension.CppExtension
    flags = {
        "cxx": ["-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden"],
        "nvcc": ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fvisibility=hidden"],
    }
    module = make(
        name="gradclip_ext._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in sources),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("GRADCLIP_EXT_WITH_CUDA", None)] if mode == "cuda" else [],
        extra_compile_args=flags if mode == "cuda" else flags["cxx"],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_py": BuildPy, "build_ext": BuildExtension}}


setup(**extension(choose_mode()))
