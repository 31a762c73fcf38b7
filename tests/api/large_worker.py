"""Run by test_accuracy.py in a process of its own: one backend, one dtype, 100 million elements.

    python large_worker.py BACKEND DEVICE DTYPE

Prints one JSON object: the relative error of the norm of every order, and by how many MiB each call raised
the peak memory above the gradients. A process of its own because the peak of a process never falls again.
"""

from __future__ import annotations

import json
import math
import resource
import sys

import torch
from torch import Tensor

import gradclip_ext

ORDERS = (2.0, 1.0, 0.5, 3.0, math.inf)
BLOCK, REPEATS = 1_000_003, 100


def peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kilobytes on Linux


def clip_in_every_way(params: list[Tensor], backend: str, device: str) -> tuple[dict, dict]:
    """Call everything once, norms before changes; return the norms and what each call added to the peak."""
    norms, rises = {}, {}
    peak = peak_mib(device)

    def note(name: str) -> None:
        nonlocal peak
        rises[name] = peak_mib(device) - peak
        peak += rises[name]

    for order in (*ORDERS, 0.0, -math.inf):
        norms[order] = gradclip_ext.clip_grad_norm_(params, math.inf, order, backend=backend)
        note(f"norm of order {order}")
    gradclip_ext.clip_grad_norm_(params, 1e3, backend=backend, error_if_nonfinite=True)
    note("clip_grad_norm_")
    gradclip_ext.clip_grad_value_(params, 1e-3, backend=backend)
    note("clip_grad_value_")
    gradclip_ext.clamp_grad_(params, -1e-4, 2e-4, backend=backend)
    note("clamp_grad_")
    return {order: norm.item() for order, norm in norms.items()}, rises


def gradients(device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return one tensor of 100 million elements, one with gaps and many small ones.

    All are filled in place, so that making them takes no more memory than they keep. The large one repeats
    a random block, so that its exact norm is quickly known; a block of odd length meets every alignment.
    """
    grads = [torch.empty(n, 1003, dtype=dtype, device=device)[:, :1000] for n in (1, 1000)]
    grads += [torch.empty(64 + i % 7, dtype=dtype, device=device) for i in range(2000)]
    for grad in grads:
        grad.uniform_(-1.0, 1.0)
    large = torch.empty(REPEATS, BLOCK, dtype=dtype, device=device)
    large[0].uniform_(-1.0, 1.0)
    for row in large[1:]:
        row.copy_(large[0])
    return [large.view(-1), *grads]


def exact_norms(block: Tensor, others: list[Tensor]) -> dict[float, float]:
    """Return the norms in float64, from elementary powers, exactly added."""
    sums: dict[float, list[float]] = {0.5: [], 1.0: [], 2.0: [], 3.0: []}
    largest = []
    for grad, times in [(block, REPEATS), *((g, 1) for g in others)]:
        x = grad.double().abs()
        for order, power in ((0.5, x.sqrt()), (1.0, x), (2.0, x * x), (3.0, x * x * x)):
            sums[order].append(times * power.sum().item())
        largest.append(x.max().item())
    return {**{p: math.fsum(parts) ** (1 / p) for p, parts in sums.items()}, math.inf: max(largest)}


def parameter(grad: Tensor) -> torch.nn.Parameter:
    param = torch.nn.Parameter(grad)  # shares the memory, to keep the peak low
    param.grad = grad
    return param


def main() -> None:
    backend, device, name = sys.argv[1:]
    dtype = getattr(torch, name)
    # Thread pools, lazy imports and compiled kernels are not what is measured.
    warm_up = [parameter(torch.ones(40_000, dtype=dtype, device=device)) for _ in range(2)]
    clip_in_every_way(warm_up, backend, device)
    grads = gradients(device, dtype)
    large, *others = grads
    kept = large[:BLOCK].clone(), [g.clone() for g in others]
    norms, rises = clip_in_every_way([parameter(g) for g in grads], backend, device)
    exact = exact_norms(*kept)  # afterwards, for what it allocates would hide a rise of the peak
    errors = {str(p): abs(norms[p] / exact[p] - 1) for p in ORDERS}
    print(json.dumps({"errors": errors, "rises": {k: v for k, v in rises.items() if v}}))


if __name__ == "__main__":
    main()
