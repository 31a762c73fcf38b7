"""Tests of the cuda and triton backends that need a GPU: graphs, streams, threads, sizes, synchronisation.

What every backend must do is in the shared suite, whose targets there end in "-cuda".
"""

from __future__ import annotations

import math
import threading

import oracle
import pytest
import torch
from cases import clones, gpu_waits_are_errors, grads_of
from oracle import assert_same_bits, parameter
from subprocesses import run_python
from torch import Tensor

import gradclip_ext
from gradclip_ext import backends
from gradclip_ext.backends.base import TensorList
from gradclip_ext.norms import REPORT

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
WHY_NOT = {name: backends.ALL[name].why_unavailable(GPU) for name in ("cuda", "triton")}

if not torch.cuda.is_available():
    pytest.skip("no CUDA device is visible", allow_module_level=True)


@pytest.fixture(params=["cuda", pytest.param("triton", marks=pytest.mark.triton)])
def name(request: pytest.FixtureRequest) -> str:
    if WHY_NOT[request.param] is not None:
        pytest.skip(f"{request.param} cannot handle this GPU: {WHY_NOT[request.param]}")
    return str(request.param)


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


def norm_of(name: str, tensors: list[Tensor], p: float = 2.0) -> Tensor:
    """Return the norm in float64, before it is rounded to what users get."""
    return backends.ALL[name].norm(TensorList(tensors), p, REPORT, torch.float64)[0]


# ---------------------------------------------------------------- graphs


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


# ---------------------------------------------------------------- nothing waits


def test_nothing_synchronizes(name: str) -> None:
    for warm in (True, False):  # lists of their own, so that tables are uploaded under scrutiny, too
        params = gpu_parameters()
        if warm:
            gradclip_ext.clip_grad_norm_(params, 1.0, backend=name)
            gradclip_ext.clip_grad_value_(params, 0.1, backend=name)
        with gpu_waits_are_errors():
            for p in (1.0, 2.0, 3.0, math.inf) if warm else (2.0,):
                gradclip_ext.clip_grad_norm_(params, 1.0, p, backend=name)
            gradclip_ext.clip_grad_value_(params, 0.1, backend=name)
            norm = gradclip_ext.get_total_norm(grads_of(params), backend=name)
            gradclip_ext.clip_grads_with_norm_(params, 1.0, norm, backend=name)


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_bits_do_not_depend_on_run_stream_or_address(name: str, p: float) -> None:
    grads = [g.clone() for g in grads_of(gpu_parameters())] * 5
    expected = norm_of(name, clones(grads), p)
    for shift in (0, 1, 3):
        moved = [torch.cat([g.new_zeros(shift), g.reshape(-1)])[shift:] for g in grads]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            assert_same_bits(norm_of(name, moved, p), expected, f"shifted by {shift}")
        torch.cuda.synchronize()


def test_streams_and_threads_have_memory_of_their_own(name: str) -> None:
    """Two threads on two streams, each many norms behind one another."""
    lists = [[torch.randn(n, device=GPU) for n in (100_000, 3, size)] for size in (40_000, 2_000_000)]
    expected = [norm_of(name, grads) for grads in lists]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(which: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            norms = [norm_of(name, lists[which]) for _ in range(50)]
            wrong.extend(which for norm in norms if not torch.equal(norm, expected[which]))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_stream_that_is_not_torchs(name: str) -> None:
    stream = torch.cuda.ExternalStream(torch.cuda.Stream().cuda_stream)
    params, twins = (parameter(torch.full((100_000,), 2.0, device=GPU)) for _ in range(2))
    expected = gradclip_ext.clip_grad_norm_(params, 1.0, backend=name)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        assert torch.equal(gradclip_ext.clip_grad_norm_(twins, 1.0, backend=name), expected)
        assert_same_bits(twins.grad, params.grad)
    torch.cuda.synchronize()


def test_memory_that_torch_fills(name: str) -> None:
    """Deterministic torch fills new memory with NaN and, where it is bytes, with 255."""
    params = gpu_parameters()
    twins = as_of(params)
    expected = gradclip_ext.clip_grad_norm_(twins, 1.0, backend=name)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for stream in (torch.cuda.Stream(), torch.cuda.ExternalStream(torch.cuda.Stream().cuda_stream)):
            torch.cuda.synchronize()
            again = as_of(params)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                assert torch.equal(gradclip_ext.clip_grad_norm_(again, 1.0, backend=name), expected)
            torch.cuda.synchronize()
            for ours, wanted in zip(again, twins):
                assert_same_bits(ours.grad, wanted.grad)
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_stream_that_is_not_the_default_is_respected(name: str) -> None:
    """Clipping runs after the earlier work of its stream, whatever the default stream does."""
    params = gpu_parameters()
    gradclip_ext.clip_grad_norm_(as_of(params), 1.0, backend=name)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for param in params:
            param.grad.fill_(2.0)
        norm = gradclip_ext.clip_grad_norm_(params, 1.0, backend=name)
    stream.synchronize()
    count = sum(p.grad.numel() for p in params)
    assert norm.item() == pytest.approx(2.0 * math.sqrt(count), rel=1e-6)


@pytest.mark.triton
def test_agrees_with_the_other_backend() -> None:
    """The gradients bit for bit, given one coefficient; the norm within 1e-7."""
    if any(WHY_NOT.values()):
        pytest.skip(f"nothing to compare: {WHY_NOT}")
    grads = [grad for grad in grads_of(gpu_parameters()) if grad.numel() > 0]
    for p in (1.0, 2.0, 3.0, math.inf):
        cuda, triton = (norm_of(name, grads, p).item() for name in WHY_NOT)
        assert triton == pytest.approx(cuda, rel=1e-7), p
    coef = torch.tensor(0.3, device=GPU)
    for change in (lambda b, g: b.scale_(g, coef), lambda b, g: b.clamp_(g, -0.2, 0.1)):
        ours, theirs = clones(grads), clones(grads)
        change(backends.ALL["triton"], TensorList(ours))
        change(backends.ALL["cuda"], TensorList(theirs))
        for a, b in zip(ours, theirs):
            assert_same_bits(a, b)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("count", [280, 281, 282, 2329, 2330, 10_000])
def test_lists_around_what_a_launch_holds(name: str, count: int) -> None:
    params = [parameter(torch.randn(1 + i % 37, device=GPU)) for i in range(count)]
    before = clones(grads_of(params))
    norm = gradclip_ext.clip_grad_norm_(params, 1.0, backend=name)
    oracle.assert_norm(norm, before, 2.0)
    oracle.assert_scaled(grads_of(params), before, norm, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_more_than_two_to_the_31_elements(name: str, dtype: torch.dtype) -> None:
    numel = 2**31 + 4099
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * numel * dtype.itemsize:
        pytest.skip(f"{free >> 30} GiB of GPU memory are free, {3 * numel * dtype.itemsize >> 30} are needed")
    grad = torch.full((numel,), 2.0**-8, dtype=dtype, device=GPU)
    grad[-1] = 64.0
    param = torch.nn.Parameter(torch.zeros((), dtype=dtype, device=GPU).expand(numel))
    param.grad = grad
    norm = gradclip_ext.clip_grad_norm_(param, 1.0, backend=name)
    assert norm.item() == pytest.approx(math.sqrt((numel - 1) * 2.0**-16 + 4096.0), rel=1e-6)
    coef = 1.0 / (norm.item() + 1e-6)
    for at in (0, 2**31 - 1, 2**31, numel - 2):
        assert grad[at].item() == pytest.approx(2.0**-8 * coef, rel=2.0**-8)
    assert grad[-1].item() == pytest.approx(64.0 * coef, rel=2.0**-8)
    gradclip_ext.clip_grad_value_(param, 1e-5, backend=name)
    assert grad.max().item() == pytest.approx(1e-5, rel=2.0**-7)


# ---------------------------------------------------------------- several devices


def test_a_list_on_several_devices(name: str) -> None:
    others = ["cpu"] + (["cuda:1"] if torch.cuda.device_count() > 1 else [])
    for other in others:
        named = name if other != "cpu" else None
        grads = [torch.randn(1000, device=d) for d in ("cuda:0", other, "cuda:0")]
        before = clones(grads)
        params = [parameter(g) for g in grads]
        norm = gradclip_ext.clip_grad_norm_(params, 1.0, backend=named)
        assert norm.device == grads[0].device
        oracle.assert_norm(norm.cpu(), [b.cpu() for b in before], 2.0)
        oracle.assert_scaled([g.cpu() for g in grads], [b.cpu() for b in before], norm.cpu(), 1.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_the_current_device_stays_what_it_is(name: str) -> None:
    param = parameter(torch.full((1000,), 2.0, device="cuda:1"))
    found: list[object] = []

    def call() -> None:
        # First what allocates nothing: torch's allocator gives a thread a context.
        gradclip_ext.clip_grad_value_(param, 0.001, backend=name)
        found.append(torch.cuda.current_device())
        gradclip_ext.clip_grad_norm_(param, 1.0, backend=name)
        found.extend((torch.cuda.current_device(), torch.empty(0, device="cuda").device.index))

    call()
    thread = threading.Thread(target=call)  # which has no context of its own yet
    thread.start()
    thread.join()
    assert found == [0] * 6
    assert param.grad.max().item() == pytest.approx(0.001)


def test_automatic_choice_is_the_first_that_is_usable() -> None:
    first = next((n for n in ("cuda", "triton") if WHY_NOT[n] is None), "foreach")
    assert backends.Selection(None, None, False).backend_for(GPU).name == first
