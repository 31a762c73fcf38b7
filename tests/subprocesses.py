"""Running Python in a process of its own, on the package that is under test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gradclip_ext

TESTS = Path(__file__).resolve().parent
PACKAGE_ROOT = Path(gradclip_ext.__file__).resolve().parent.parent


def run_python(*args: str, timeout: float, **environment: str) -> str:
    """Run ``python *args`` away from the checkout and return its stdout; fail with its stderr."""
    path = os.pathsep.join(filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd="/",
        env={**os.environ, "PYTHONPATH": path, **environment},
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
