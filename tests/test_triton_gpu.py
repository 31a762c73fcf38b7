"""The triton backend on a GPU: graphs, streams, threads, synchronisation, and the cuda backend beside it.

What every backend must do is in the shared suite, which runs there as triton-cuda.
"""

from __future__ import annotations

import math
import threading

import pytest
import torch
from oracle import parameter
from torch import Tensor

import gradclip_ext
from gradclip_ext import backends

UNUSABLE = backends.ALL["triton"].unusable(torch.device("cuda"))
pytestmark = pytest.mark.skipif(UNUSABLE is not None, reason=f"triton cannot serve a GPU here: {UNUSABLE}")


def gpu_parameters() -> list[Tensor]:
    shapes = ((70_000,), (33,), (129, 65), ())
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float32)
    return [parameter(torch.randn(s, device="cuda").to(d)) for s, d in zip(shapes, dtypes)]


def test_captured_graph_replays_on_new_values() -> None:
    params, others = gpu_parameters(), gpu_parameters()
    gradclip_ext.clip_grad_norm_(params, 1.0, backend="triton")  # compiles
    gradclip_ext.clip_grad_value_(params, 1.0, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = gradclip_ext.clip_grad_norm_(params, 1.0, backend="triton")
        gradclip_ext.clip_grad_value_(params, 0.003, backend="triton")
    for scale in (1e-6, 3.0, 500.0):  # the first is not clipped
        for _ in range(20):  # other tables, and other uses of page-locked memory, come and go
            gradclip_ext.clip_grad_norm_([parameter(p.grad.clone()) for p in others], 1.0, backend="triton")
        twins = [parameter(torch.randn_like(p.grad) * scale) for p in params]
        for param, twin in zip(params, twins):
            param.grad.copy_(twin.grad)
        graph.replay()
        expected = gradclip_ext.clip_grad_norm_(twins, 1.0, backend="triton")
        gradclip_ext.clip_grad_value_(twins, 0.003, backend="triton")
        assert torch.equal(norm, expected)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(params, twins))


def test_nothing_synchronizes() -> None:
    for warm in (True, False):  # lists of their own, so that tables are uploaded under scrutiny, too
        params = gpu_parameters()
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            for _ in range(2):
                gradclip_ext.clip_grad_norm_(params, 1.0, backend="triton")
                gradclip_ext.clip_grad_value_(params, 0.1, backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_streams_and_threads_have_memory_of_their_own() -> None:
    """Two threads on two streams; what they share is the lock under which they launch."""
    lists = [[torch.randn(n, device="cuda") for n in (100_000, 3, size)] for size in (40_000, 2_000_000)]
    backend = backends.ALL["triton"]
    expected = [backend.norm(grads, 2.0) for grads in lists]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(which: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            norms = [backend.norm(lists[which], 2.0) for _ in range(50)]
            wrong.extend(which for norm in norms if not torch.equal(norm, expected[which]))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_agrees_with_cuda() -> None:
    """The gradients bit for bit, given one coefficient; the norm within 1e-7."""
    cuda = backends.ALL.get("cuda")
    reason = "there is no cuda backend" if cuda is None else cuda.unusable(torch.device("cuda"))
    if cuda is None or reason is not None:
        pytest.skip(f"nothing to compare with: {reason}")
    grads = [p.grad for p in gpu_parameters()]
    for p in (1.0, 2.0, 3.0, math.inf):
        theirs = cuda.norm(grads, p).double()
        assert backends.ALL["triton"].norm(grads, p).item() == pytest.approx(theirs.item(), rel=1e-7), p
    coef = torch.tensor(0.3, device="cuda")
    for change in (lambda b, g: b.scale_(g, coef), lambda b, g: b.clamp_(g, -0.2, 0.1)):
        ours, theirs = ([g.clone() for g in grads] for _ in range(2))
        change(backends.ALL["triton"], ours)
        change(cuda, theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
