"""Where the CUDA compiler and its disassembler are, for the tests that read compiled kernels."""

import importlib.util
import os
import runpy
import shutil
from pathlib import Path
from unittest import mock

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
