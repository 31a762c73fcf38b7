"""Every function on DTensor gradients, on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cases import SEED, needs_gloo
from subprocesses import PACKAGE_ROOT

WORKER = Path(__file__).with_name("dtensor_worker.py")


@needs_gloo
def test_dtensors_on_two_ranks(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH")))
    )
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(WORKER),
                str(r),
                "2",
                str(tmp_path / "init"),
                str(SEED % 10**6),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for r in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs):
        assert rank.returncode == 0, "\n".join(outputs)
        assert output.count("ok ") == 5, output
