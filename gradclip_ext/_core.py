"""The compiled module, where there is one that fits.

A ``_C`` built for another torch may import and fail later, or die on an undefined symbol while
importing, so the versions are compared first.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch


def load() -> tuple[ModuleType | None, str | None]:
    """Return ``gradclip_ext._C`` and None, or None and the reason why it is not used."""
    try:
        built_for = importlib.import_module("gradclip_ext._build_info").TORCH  # written by setup.py
    except ModuleNotFoundError:
        return None, "the compiled module was not built (see the log of pip install -v)"
    if built_for != torch.__version__:
        reason = (
            f"the compiled module was built for torch {built_for}, this is torch {torch.__version__}: "
            "reinstall with --no-build-isolation"
        )
    else:
        try:
            return importlib.import_module("gradclip_ext._C"), None
        except ImportError as error:
            reason = f"the compiled module cannot be imported: {error}"
    warnings.warn(f"gradclip_ext falls back on torch operations: {reason}", RuntimeWarning, stacklevel=2)
    return None, reason


C, REASON = load()
