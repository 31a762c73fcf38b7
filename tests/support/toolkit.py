"""Where the CUDA compiler and its disassembler are, for the tests that read compiled kernels."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
# `make check-cuda` makes sure that nothing is missing.
IS_CHECK_CUDA = bool(os.environ.get("GRADCLIP_EXT_CHECK_CUDA"))


def find_toolkit() -> Path | None:
    """Return the folder of the CUDA toolkit: $CUDA_HOME, that of the nvcc on PATH, or the usual place."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    candidates += ["/usr/local/cuda", "/opt/cuda"]
    for folder in map(Path, filter(None, candidates)):
        if (folder / "include" / "cuda_runtime.h").is_file() and (folder / "bin" / "nvcc").is_file():
            return folder
    return None


def find_cuobjdump() -> Path | None:
    """Return cuobjdump from the toolkit or from PATH, else the one that Triton's wheel carries."""
    toolkit = find_toolkit()
    candidates = [toolkit / "bin" / "cuobjdump"] if toolkit else []
    candidates += [Path(found)] if (found := shutil.which("cuobjdump")) else []
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((path for path in candidates if path.is_file()), None)


def missing(reason: str) -> NoReturn:
    """Skip, or fail under `make check-cuda`."""
    if IS_CHECK_CUDA:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)
