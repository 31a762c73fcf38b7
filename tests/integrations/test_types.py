"""Type checkers know the type of every public name, where the base classes of integrations are installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("basedpyright", reason="basedpyright is not installed")
ROOT = Path(__file__).parents[2]


def test_every_public_type_is_known(tmp_path: Path) -> None:
    # The checker does not follow an editable installation.
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", tmp_path]
    subprocess.run([*pip, ROOT], check=True, env={**os.environ, "GRADCLIP_EXT_BUILD": "none"})
    # It asks the first python on PATH for the folders of packages.
    folder = Path(sys.executable).parent
    environment = {"PYTHONPATH": str(tmp_path), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [folder / "basedpyright", "--verifytypes", "gradclip_ext", "--ignoreexternal", "--outputjson"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    found = json.loads(done.stdout)["typeCompleteness"]
    unknown = [s for s in found["symbols"] if s["isExported"] and not s["isTypeKnown"]]
    assert found["exportedSymbolCounts"]["withKnownType"] > 400
    assert not unknown and found["completenessScore"] == 1.0, unknown
