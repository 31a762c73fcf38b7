"""Where the CUDA compiler and its disassembler are, for the tests that read compiled kernels."""

import importlib.util
import os
import runpy
import shutil
from pathlib import Path
from typing import NoReturn
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]


def find_toolkit() -> Path | None:
    """Return the CUDA toolkit that setup.py would build with."""
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, GRADCLIP_EXT_BUILD="none"):
        return runpy.run_path(str(ROOT / "setup.py"))["find_toolkit"]()


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
    """Skip, or fail where `make check-cuda` has seen to it that nothing is missing."""
    if os.environ.get("GRADCLIP_EXT_CHECK_CUDA"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)
