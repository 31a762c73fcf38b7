"""The compiled module, or why it is missing.

One build fits every torch. What setup.py could not build, and why, is in ``_build_info.py`` beside it.
"""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any


def load() -> tuple[Any, str | None]:
    """Return ``gradclip_ext._C`` and None, or None and why it is missing.

    Warns where somebody probably wanted it: when its compilation failed, when it cannot be imported, and
    when Python imports a source folder instead of the installed package.
    """
    try:
        return importlib.import_module("gradclip_ext._C"), None
    except ModuleNotFoundError as error:
        if error.name != "gradclip_ext._C":
            reason = f"the compiled module cannot be imported: {error}"
        elif (shadowed := _installed_elsewhere()) is not None:
            reason = (
                f"Python imports the source folder {Path(__file__).parent}, which shadows the package "
                f"that is installed in {shadowed}: run Python in another folder, or pip install -e ."
            )
        elif (failure := getattr(_build_info, "CPU_REASON", None)) is not None:
            reason = f"the compiled module was not built: {failure}"
        else:
            return None, "the compiled module was not built (GRADCLIP_EXT_BUILD=none, or no installation)"
    except ImportError as error:
        reason = f"the compiled module cannot be imported: {error}"
    warnings.warn(f"gradclip_ext falls back on torch operations: {reason}", RuntimeWarning, stacklevel=2)
    return None, reason


def _installed_elsewhere() -> Path | None:
    """Return the folder of an installed gradclip_ext with a compiled module that is not this one."""
    here = Path(__file__).parent.resolve()
    # A build leaves an egg-info folder in the checkout, which is found first and lists no module.
    for installed in distributions(name="gradclip_ext"):
        for file in installed.files or []:
            path = Path(str(file.locate()))
            if path.name.startswith("_C.") and path.is_file() and path.parent.resolve() != here:
                return path.parent
    return None


def _find_build_info() -> ModuleType | None:
    try:
        return importlib.import_module("gradclip_ext._build_info")
    except ModuleNotFoundError:
        return None


_build_info = _find_build_info()
BUILT_FOR_CUDA: str | None = getattr(_build_info, "CUDA", None)
ARCHITECTURES: str | None = getattr(_build_info, "ARCHITECTURES", None)
CUDA_REASON: str | None = getattr(_build_info, "CUDA_REASON", None)
C, REASON = load()
