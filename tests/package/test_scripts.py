"""``python -m gradclip_ext``: a script under the patch, and the startup file for spawned workers."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from subprocesses import PACKAGE_ROOT, run_python

SCRIPT = """
import sys, torch, torch.multiprocessing
import holder  # beside the script

def whose(queue):
    queue.put(torch.nn.utils.clip_grad_norm_.__module__)

if __name__ == "__main__":
    print(*sys.argv[1:], torch.nn.utils.clip_grad_norm_.__module__, holder.clip_grad_norm_.__module__)
    sys.stderr = sys.stdout
    if "spawn" in sys.argv:
        context = torch.multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        process = context.Process(target=whose, args=(queue,))
        process.start()
        process.join()
        print("spawned", queue.get())
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "holder.py").write_text("from torch.nn.utils import clip_grad_norm_\n")
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path / "train.py"


def test_runs_a_script_under_the_patch(script: Path) -> None:
    said = run_python("-m", "gradclip_ext", "--report", str(script), "--lr", "--report", timeout=60)
    assert said.startswith("--lr --report gradclip_ext.clip gradclip_ext.clip\n")
    assert "torch.nn.utils.clip_grad_norm_" in said
    assert "calls        none" in said


def test_a_script_knows_its_own_path(tmp_path: Path) -> None:
    """Absolute, as Python gives it: a script may change its folder."""
    (tmp_path / "where.py").write_text("import os, sys; os.chdir('/'); print(__file__ == sys.argv[1])")
    path = os.pathsep.join((str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "gradclip_ext", "where.py", str(tmp_path / "where.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "True\n"


def test_runs_a_module_under_the_patch(script: Path) -> None:
    path = os.pathsep.join((str(script.parent), str(PACKAGE_ROOT)))
    said = run_python("-m", "gradclip_ext", "-m", "train", "5", timeout=60, PYTHONPATH=path)
    assert said == "5 gradclip_ext.clip gradclip_ext.clip\n"


@pytest.mark.parametrize("arguments", [(), ("-m",), ("--install-startup", "--remove-startup")])
def test_without_a_script_it_says_what_to_do(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gradclip_ext", *arguments], capture_output=True, text=True, timeout=60,
        cwd=PACKAGE_ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "usage: python -m gradclip_ext" in done.stderr


def test_the_startup_file_reaches_spawned_workers(tmp_path: Path, script: Path) -> None:
    """In an environment of its own that sees the packages of this one."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    seen = [str(PACKAGE_ROOT), *site.getsitepackages()]
    (packages / "seen.pth").write_text("\n".join(seen))

    def run(*arguments: str, **environment: str) -> str:
        without = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "GRADCLIP_EXT_PATCH")}
        return subprocess.run(
            [python, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=True,
            env={**without, **environment},
        ).stdout  # fmt: skip

    assert "spawned torch.nn.utils.clip_grad" in run("-m", "gradclip_ext", str(script), "spawn")
    assert "wrote" in run("-m", "gradclip_ext", "--install-startup")
    assert "spawned gradclip_ext.clip" in run("-m", "gradclip_ext", str(script), "spawn")
    both = "gradclip_ext.clip gradclip_ext.clip"
    assert run(str(script), GRADCLIP_EXT_PATCH="1").strip() == both
    assert both not in run(str(script))
    asked = "import sys; print('torch' in sys.modules, 'gradclip_ext' in sys.modules)"
    assert run("-c", asked, GRADCLIP_EXT_PATCH="1") == "False False\n"  # nothing before torch is imported
    assert "removed" in run("-m", "gradclip_ext", "--remove-startup")
    assert both not in run(str(script), GRADCLIP_EXT_PATCH="1")
    assert "nothing to remove" in run("-m", "gradclip_ext", "--remove-startup")
