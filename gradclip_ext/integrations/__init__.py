"""Clipping where a training framework does it: one module for each, imported on demand.

``patch_torch()`` reaches all of them that call torch.nn.utils. These modules add what that cannot: limits
that adapt, norms in the logs, fused optimizers under a GradScaler, one collective instead of several. Each
imports its framework, which this package does not install.
"""

from typing import Any

DEEPSPEED_CLIPS_BY_ITSELF = (
    "DeepSpeed clips by itself, after backward: set gradient_clipping in its configuration "
    "instead of ClipGradients (gradclip_ext.integrations.deepspeed makes that faster)"
)


def group_of(group: Any) -> Any:
    """Return a callback's group, which may be a function: some groups exist only once training runs."""
    return group() if callable(group) else group
