"""``python -m gradclip_ext train.py --lr 0.1``: run a script whose clipping is this package's.

Also behind torchrun: ``torchrun --nproc-per-node 8 -m gradclip_ext train.py``.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import sys
import sysconfig
from pathlib import Path

from gradclip_ext import patch_torch
from gradclip_ext.calls import REPORT_VARIABLE, report_at_exit

_PATCH_VARIABLE = "GRADCLIP_EXT_PATCH"
_PTH = f'import os; os.environ.get("{_PATCH_VARIABLE}") == "1" and __import__("_gradclip_ext_startup")\n'


def _startup_files() -> tuple[Path, Path]:
    folder = Path(sysconfig.get_path("purelib"))
    return folder / "_gradclip_ext_startup.pth", folder / "_gradclip_ext_startup.py"


def install_startup() -> str:
    """Let every Python process of this environment be patched where GRADCLIP_EXT_PATCH=1."""
    pth, module = _startup_files()
    shutil.copyfile(Path(__file__).with_name("_startup.py"), module)
    pth.write_text(_PTH, encoding="utf-8")
    return (
        f"wrote {pth} and {module.name} beside it: Python processes of this environment patch torch when "
        f"they import it, if {_PATCH_VARIABLE}=1 is set; without it, nothing happens"
    )


def remove_startup() -> str:
    """Remove what --install-startup wrote."""
    removed = [file for file in _startup_files() if file.exists()]
    for file in removed:
        file.unlink()
    return "removed " + ", ".join(map(str, removed)) if removed else "there was nothing to remove"


def run(script: str, arguments: list[str], is_module: bool) -> None:
    """Run a script, or a module by name, as Python itself would, under the patch."""
    os.environ[_PATCH_VARIABLE] = "1"  # for the processes that it starts, see install_startup
    patch_torch()
    sys.argv = [script, *arguments]
    if is_module:  # Python has put the current folder into sys.path already
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        if not getattr(sys.flags, "safe_path", False):  # python -P: the first entry is no script's folder
            sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(str(Path(script).absolute()), run_name="__main__")  # as Python sets __file__


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m gradclip_ext", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("-m", dest="is_module", action="store_true", help="the script is a module's name")
    parser.add_argument("--report", action="store_true", help=f"report at exit, as {REPORT_VARIABLE}=1")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--install-startup", action="store_true", help=install_startup.__doc__)
    one.add_argument("--remove-startup", action="store_true", help=remove_startup.__doc__)
    parser.add_argument("script", nargs="?", help="what to run, with the arguments after it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.install_startup or given.remove_startup:
        print(install_startup() if given.install_startup else remove_startup())
        return
    if given.script is None:
        parser.error("name a script, or a module after -m")
    if given.report:
        os.environ[REPORT_VARIABLE] = "1"
        report_at_exit()
    run(given.script, given.arguments, given.is_module)


if __name__ == "__main__":
    main()
