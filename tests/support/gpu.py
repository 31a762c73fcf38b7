"""What the tests of the backends on a GPU share."""

from __future__ import annotations

import torch
from cases import clones, grads_of
from oracle import parameter
from torch import Tensor

from gradclip_ext import backends

GPU = torch.device("cuda")
WHY_NOT = {name: backends.ALL[name].why_unavailable(GPU) for name in ("cuda", "triton")}


def gpu_parameters() -> list[Tensor]:
    dtypes = {
        (0,): torch.float32,
        (70_000,): torch.float32,
        (33,): torch.bfloat16,
        (129, 65): torch.float16,
        (): torch.float32,
        (0, 3): torch.bfloat16,
        (100_001,): torch.float32,
    }
    return [parameter(torch.randn(shape, device=GPU).to(dtype)) for shape, dtype in dtypes.items()]


def as_of(params: list[Tensor]) -> list[Tensor]:
    """Return other parameters with the same gradients."""
    return [parameter(grad) for grad in clones(grads_of(params))]
