"""Calls gradclip_ext.patch_torch() as soon as this process imports torch.

``python -m gradclip_ext --install-startup`` copies this file into site-packages, beside a ``.pth`` file that
imports it where GRADCLIP_EXT_PATCH=1. It must not import torch itself: most helper processes never do.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class PatchAfterTorch(MetaPathFinder):
    """Finds ``torch`` as the other finders do, and adds the patch to what its loader executes."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                patch()

            spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def patch() -> None:
    try:
        import gradclip_ext  # noqa: PLC0415
    except ImportError as error:  # no reason to stop a training that runs without it
        print(f"GRADCLIP_EXT_PATCH=1, but torch is not patched: {error}", file=sys.stderr)
        return
    gradclip_ext.patch_torch()


def install() -> None:
    """Wait for torch, in a process that has not imported it."""
    sys.meta_path.insert(0, PatchAfterTorch())


if __name__ == "_gradclip_ext_startup":
    install()
