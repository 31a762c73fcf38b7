"""Running Python in a process of its own, on the package that is under test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gradclip_ext

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
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


def run_with_triton(*args: object, timeout: float, interpret: bool = False) -> str:
    """Run Python on the package and the tests' helpers, and return stdout.

    Whether Triton compiles or interprets is decided by TRITON_INTERPRET when it is imported.
    """
    return run_python(
        *map(str, args),
        timeout=timeout,
        PYTHONPATH=os.pathsep.join(map(str, (PACKAGE_ROOT, TESTS, SUPPORT))),
        TRITON_INTERPRET="1" if interpret else "0",
        GRADCLIP_EXT_BACKEND="",
    )
