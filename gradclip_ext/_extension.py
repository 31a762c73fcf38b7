"""The compiled module, or why it is missing."""
from __future__ import annotations
import importlib
from typing import Any
C: Any = None
REASON: str | None = None
CUDA_REASON: str | None = "not built"
BUILT_FOR_CUDA = None
ARCHITECTURES = None
try:
    C = importlib.import_module("gradclip_ext._C")
except ImportError as error:
    REASON = f"the compiled module cannot be imported: {error}"
