"""Running commands, for the tests and scripts in this folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """Run a command and return what it printed; raise what it printed if it fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")
    return done.stdout
