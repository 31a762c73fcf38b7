"""Graphs that capture the cuda and triton backends on a GPU, and launches that overlap."""

from __future__ import annotations

import sys

import oracle
import pytest
import torch
from cases import clones, grads_of
from gpu import GPU, WHY_NOT, as_of, gpu_parameters
from oracle import parameter
from subprocesses import run_python
from torch import Tensor

import gradclip_ext

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device is visible", allow_module_level=True)


def test_captured_graph_replays_on_new_values(name: str) -> None:
    params, others = gpu_parameters(), gpu_parameters()
    gradclip_ext.clip_grad_norm_(params, 1.0, backend=name)  # loads or compiles
    gradclip_ext.clip_grad_value_(params, 1.0, backend=name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = gradclip_ext.clip_grad_norm_(params, 1.0, backend=name)
        gradclip_ext.clip_grad_value_(params, 0.003, backend=name)
    for scale in (1e-6, 3.0, 500.0):  # the first is not clipped
        for _ in range(20):  # calls that make other tables, and use page-locked memory
            gradclip_ext.clip_grad_norm_(as_of(others), 1.0, backend=name)
        twins = [parameter(torch.randn_like(p.grad) * scale) for p in params]
        for param, twin in zip(params, twins):
            param.grad.copy_(twin.grad)
        graph.replay()
        expected = gradclip_ext.clip_grad_norm_(twins, 1.0, backend=name)
        gradclip_ext.clip_grad_value_(twins, 0.003, backend=name)
        assert torch.equal(norm, expected)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(params, twins))


COMPILERS: dict[str, dict[str, str]] = {
    "aot_eager": {"backend": "aot_eager"},
    "inductor": {"backend": "inductor"},
    "graphs": {"mode": "reduce-overhead"},
}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled(name: str, compiler: str) -> None:
    if compiler != "aot_eager" and "emulated" in sys.modules:
        pytest.skip("what inductor compiles needs a GPU")
    torch._dynamo.reset()
    params = gpu_parameters()
    compiled = torch.compile(
        lambda ps: gradclip_ext.clip_grad_norm_(ps, 1.0, backend=name), fullgraph=True, **COMPILERS[compiler]
    )
    for scale in (1e-6, 3.0, 500.0, 1e-6):  # with "graphs", the first calls run, the next is captured
        for param in params:
            param.grad.copy_(torch.randn_like(param.grad) * scale)
        before = clones(grads_of(params))
        norm = compiled(params).clone()
        assert torch.equal(norm, gradclip_ext.get_total_norm(before, backend=name))
        oracle.assert_scaled(grads_of(params), before, norm, 1.0, f"{compiler}, {scale}")


def test_two_captures_in_one_graph_and_a_split_norm(name: str) -> None:
    params, warm = gpu_parameters(), gpu_parameters()
    norm = gradclip_ext.get_total_norm(grads_of(warm), backend=name)
    gradclip_ext.clip_grads_with_norm_(warm, 1.0, norm, backend=name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = gradclip_ext.get_total_norm(grads_of(params), backend=name)
        gradclip_ext.clip_grads_with_norm_(params, 1.0, first, backend=name)
        second = gradclip_ext.get_total_norm(grads_of(params), backend=name)
    for _ in range(3):
        for param in params:
            param.grad.normal_()
        graph.replay()
        assert first > 1.0 and second.item() == pytest.approx(1.0, rel=1e-3)


def test_results_for_each_tensor_are_captured(name: str) -> None:
    """Device limits, norms, statistics and adaptive clipping of each tensor: replayed on new values."""
    if name != "cuda":
        pytest.skip("kernels of the cuda backend")
    params = [*gpu_parameters(), parameter(torch.ones(3, 100_000, device="cuda"))]
    twins = as_of(params)
    for param in params:
        param.data.normal_()
    limit, limits = torch.tensor(0.7, device="cuda"), torch.rand(len(params), device="cuda")

    def step(params: list[Tensor]) -> list[Tensor]:
        stats = gradclip_ext.get_grad_stats(params, backend=name)
        gradclip_ext.adaptive_clip_grad_(params, 0.05, backend=name)
        norms = gradclip_ext.clip_grad_norm_(params, limits, per_tensor=True, backend=name)
        norm = gradclip_ext.clip_grad_norm_(params, limit, zero_if_nonfinite=True, backend=name)
        return [norm, norms, stats.total_norm, stats.norms, stats.absmax, stats.zeros]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(params)
    for _ in range(2):
        limit.uniform_()
        limits.uniform_()
        for param, twin in zip(params, twins):
            param.grad.normal_()
            twin.grad.copy_(param.grad)
            twin.data.copy_(param.data)
        graph.replay()
        for found, expected in zip(captured, step(twins)):
            assert torch.equal(found, expected)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(params, twins))


FIRST_CALL_IS_CAPTURED = """
import torch, gradclip_ext

params = []
for n in range(1, 301):  # two sizes of launches
    params.append(torch.nn.Parameter(torch.empty(n, device="cuda")))
    params[-1].grad = torch.full((n,), 2.0, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    norms = [gradclip_ext.get_total_norm([p.grad for p in params[:count]], 1.0) for count in (10, 300)]
    gradclip_ext.clip_grad_value_(params, 1.0)
    after = gradclip_ext.clip_grad_norm_(params, 1.0)
graph.replay()
count = sum(p.numel() for p in params)
assert [norm.item() for norm in norms] == [110.0, 2.0 * count], norms
assert abs(after.item() - count**0.5) < 1e-4 and abs(params[-1].grad[-1].item() - count**-0.5) < 1e-6
print(gradclip_ext.backends.Selection(None, None, False).backend_for(params[0].device).name)
"""


def test_a_process_may_begin_with_a_capture() -> None:
    """The cuda backend loads what it needs by itself; triton asks for a call before."""
    if WHY_NOT["cuda"] is not None:
        pytest.skip(f"cuda cannot handle this GPU: {WHY_NOT['cuda']}")
    assert run_python("-c", FIRST_CALL_IS_CAPTURED, timeout=300, GRADCLIP_EXT_BACKEND="cuda") == "cuda\n"


FIRST_NORM_BESIDE_A_CAPTURE = """
import threading, torch, gradclip_ext

grads = [torch.full((1000,), 2.0, device="cuda"), torch.ones(3, device="cuda")]
streams = [torch.cuda.Stream(), torch.cuda.Stream()]
held, norms = [], []
for stream in streams:  # torch's allocator must not have to ask for memory beside a capture
    with torch.cuda.stream(stream):
        held.append(torch.empty(1000, device="cuda"))

def work():
    for stream in streams:
        with torch.cuda.stream(stream):
            norms.append(gradclip_ext.get_total_norm(grads, 1.0))

graph, count = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
torch.cuda.synchronize()
with torch.cuda.graph(graph):  # other threads may call nothing that is unsafe in a capture
    count.add_(1)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
graph.replay()
torch.cuda.synchronize()
print(count.item(), [norm.item() for norm in norms])
"""


def test_a_first_norm_does_not_break_the_capture_of_another_thread() -> None:
    if WHY_NOT["cuda"] is not None:
        pytest.skip(f"cuda cannot handle this GPU: {WHY_NOT['cuda']}")
    out = run_python("-c", FIRST_NORM_BESIDE_A_CAPTURE, timeout=300, GRADCLIP_EXT_BACKEND="cuda")
    assert out == "1.0 [2003.0, 2003.0]\n"


def test_launches_of_a_long_list_have_the_bits_of_each_run(name: str) -> None:
    """Kernels that may start before the last one has ended, called and replayed, many behind one another."""
    original = [torch.randn(100 + i % 50, device=GPU) for i in range(5000)]
    lists = [[parameter(grad) for grad in clones(original)] for _ in range(2)]

    def step(params: list[Tensor]) -> Tensor:
        torch._foreach_copy_(grads_of(params), original)
        norm = gradclip_ext.clip_grad_norm_(params, 1.0, backend=name)
        gradclip_ext.clip_grad_value_(params, 1e-3, backend=name)
        return norm

    expected = step(lists[0]).clone()
    oracle.assert_norm(expected, original, 2.0)
    torch.cuda.synchronize()
    norms = [step(lists[1]) for _ in range(10)]
    assert all(torch.equal(norm, expected) for norm in norms)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*lists))
    if name != "cuda":
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = step(lists[1])
    for _ in range(5):
        norm.fill_(0.0)
        graph.replay()
        step(lists[0])
        assert torch.equal(norm, expected)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*lists))
