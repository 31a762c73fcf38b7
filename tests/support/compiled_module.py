"""Hides the compiled module if GRADCLIP_EXT_TEST_WITHOUT_C=1: what remains is the same, only slower.

Imported before gradclip_ext, by the tests and by the ranks that they start.
"""

from __future__ import annotations

import os
import sys

if os.environ.get("GRADCLIP_EXT_TEST_WITHOUT_C") == "1":
    sys.modules["gradclip_ext._C"] = None  # type: ignore[assignment]
