"""The emulated GPU detects the errors it is made for, and what only it can test: CUDA calls that fail."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator

import pytest
import torch
from cases import clones
from oracle import assert_same_bits, parameter
from subprocesses import run_python

import gradclip_ext
from gradclip_ext.backends import compiled

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available() or torch.cuda.get_device_name() != "Emulated GPU":
    pytest.skip("there is no emulated GPU: tests/cuda_emulator/run.py has one", allow_module_level=True)


def test_a_result_is_not_there_before_it_is_waited_for() -> None:
    on_cpu = importlib.import_module("sitecustomize").on_cpu
    grad = torch.randn(4)
    grads, expected = [grad.cuda()], grad.norm()
    torch.cuda.synchronize()
    norm = gradclip_ext.get_total_norm(grads, backend="cuda")
    assert on_cpu(norm) != pytest.approx(expected) and not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert on_cpu(norm) == pytest.approx(expected) and torch.cuda.current_stream().query()


def test_another_stream_is_not_waited_for() -> None:
    on_cpu = importlib.import_module("sitecustomize").on_cpu
    grad = torch.randn(4)
    grads, expected = [grad.cuda()], grad.norm()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        norm = gradclip_ext.get_total_norm(grads, backend="cuda")
    torch.cuda.current_stream().synchronize()
    assert on_cpu(norm) != pytest.approx(expected)
    torch.cuda.current_stream().wait_stream(stream)
    assert norm.item() == pytest.approx(expected)


@pytest.fixture
def green_context() -> Iterator[None]:
    runtime = importlib.import_module("sitecustomize").RUNTIME
    torch.cuda.synchronize()
    runtime.cudaEmulatorSetGreen(0, True)
    yield
    torch.cuda.synchronize()
    runtime.cudaEmulatorSetGreen(0, False)


def test_a_green_context_keeps_its_default_stream(green_context: None) -> None:
    """That of the primary context has the same handle, but torch's operations do not go there."""
    param = parameter(torch.full((70_000,), 1.0, device="cuda"))
    for _ in range(3):
        param.grad.fill_(2.0)
        norm = gradclip_ext.clip_grad_norm_(param, 35_000.0, 1.0, backend="cuda")
        torch.cuda.current_stream().synchronize()
        on_cpu = importlib.import_module("sitecustomize").on_cpu
        assert on_cpu(norm).item() == 140_000.0
        assert on_cpu(param.grad).unique().item() == pytest.approx(0.5)


def test_the_counter_of_a_default_stream_is_not_that_of_a_green_one(green_context: None) -> None:
    """Two norms may run at once there, so each clears a counter of its own."""
    runtime = importlib.import_module("sitecustomize").RUNTIME
    grads = [torch.full((70_000,), 2.0, device="cuda")]
    runtime.cudaEmulatorFail(b"cudaMemsetAsync", 1, 2)
    with pytest.raises(RuntimeError, match="CUDA error"):
        gradclip_ext.get_total_norm(grads, backend="cuda")
    assert gradclip_ext.get_total_norm(grads, 1.0, backend="cuda").item() == 140_000.0


WRITES_TOO_FAR = """
import ctypes, torch
tensor = torch.empty(100, dtype=torch.uint8, device="cuda")
ctypes.memset(tensor.data_ptr() + 100, 0, 1)
del tensor
"""


def test_a_write_behind_an_allocation_ends_the_process() -> None:
    with pytest.raises(AssertionError, match="past the end of an allocation"):
        run_python("-c", WRITES_TOO_FAR, timeout=100, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


WAITS_IN_A_CAPTURE = """
import torch
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    {}
"""


@pytest.mark.parametrize("call", ["torch.cuda.synchronize()", "torch.ones(2, device='cuda').cpu()"])
def test_a_capture_refuses_to_wait(call: str) -> None:
    """In a process of its own: torch's allocator does not work any more after a capture that failed."""
    with pytest.raises(AssertionError, match=r"called a synchronizing CUDA operation|emulated CUDA error 90"):
        run_python("-c", WAITS_IN_A_CAPTURE.format(call), timeout=100)


# ---------------------------------------------------------------- calls that fail

PROBE_FAILS = """
import ctypes, torch, gradclip_ext
from gradclip_ext import backends

runtime, gpu = ctypes.CDLL(None), torch.device("cuda:0")

def capture_mode():
    mode = ctypes.c_int(2)
    for _ in range(2):  # there and back
        found = mode.value
        assert runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
    return found

grads, before = [torch.full((1000,), 2.0, device="cuda")], capture_mode()
for function in (b"cudaSetDevice", b"cudaFuncGetAttributes", b"cudaGetSymbolAddress"):
    runtime.cudaEmulatorFail(function, 1, 2)  # too little memory
    print("cannot be loaded now" in backends.ALL["cuda"].why_unavailable(gpu), capture_mode() == before)
print(gradclip_ext.get_total_norm(grads, 1.0, backend="cuda").item(), capture_mode() == before)
"""


def test_a_failing_probe_leaves_no_trace() -> None:
    out = run_python("-c", PROBE_FAILS, timeout=100)
    assert out == 3 * "True True\n" + "2000.0 True\n"


NO_CODE_FOR_THIS_GPU = """
import ctypes, warnings, torch, gradclip_ext
from gradclip_ext import backends

ctypes.CDLL(None).cudaEmulatorFail(b"cudaFuncGetAttributes", 1, 209)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for device in ("cuda:0", "cuda", "cuda:0", "cuda:1"):
        print(backends.Selection(None, None, False).backend_for(torch.device(device)).name)
print(len(caught), "slower backends" in str(caught[0].message))
"""


def test_a_binary_without_code_for_a_gpu_is_asked_once() -> None:
    out = run_python("-c", NO_CODE_FOR_THIS_GPU, timeout=100, TRITON_INTERPRET="1")
    assert out == 3 * "foreach\n" + "cuda\n" + "1 True\n"


def external_stream() -> torch.cuda.ExternalStream:
    """Return a stream that torch has not created."""
    stream = ctypes.c_void_p()
    runtime = importlib.import_module("sitecustomize").RUNTIME
    assert runtime.cudaStreamCreateWithPriority(ctypes.byref(stream), 0, 0) == 0
    return torch.cuda.ExternalStream(stream.value)


def set_pool_stream(monkeypatch: pytest.MonkeyPatch, is_pool_stream: bool) -> None:
    """Let every stream count as one that lives as long as the process, or none."""
    find = compiled.current_stream
    monkeypatch.setattr(compiled, "current_stream", lambda device: (find(device)[0], is_pool_stream))


@pytest.mark.parametrize("is_pool_stream", [True, False])
@pytest.mark.parametrize(
    "function", ["cudaSetDevice", "cudaStreamIsCapturing", "cudaLaunchKernelExC", "cudaMemsetAsync"]
)
def test_after_a_failure_the_next_norm_of_a_stream_is_right(
    monkeypatch: pytest.MonkeyPatch, function: str, is_pool_stream: bool
) -> None:
    set_pool_stream(monkeypatch, is_pool_stream)
    runtime = importlib.import_module("sitecustomize").RUNTIME
    param = parameter(torch.full((70_000,), 2.0, device="cuda"))
    (before,) = clones([param.grad])
    gradclip_ext.get_total_norm([param.grad], backend="cuda")  # loads the kernels
    torch.cuda.synchronize()
    with torch.cuda.stream(external_stream()):
        runtime.cudaEmulatorFail(function.encode(), 1, 2)
        if function == "cudaMemsetAsync" and is_pool_stream:  # the counter of a pool stream is never cleared
            gradclip_ext.get_total_norm([param.grad], backend="cuda")
        else:
            with pytest.raises(RuntimeError, match="CUDA error"):
                gradclip_ext.clip_grad_norm_(param, 1.0, backend="cuda")
        runtime.cudaEmulatorFail(function.encode(), 0, 0)
        assert_same_bits(param.grad, before)
        for _ in range(2):
            norm = gradclip_ext.get_total_norm([param.grad], 1.0, backend="cuda")
            assert norm.item() == 140_000.0
    torch.cuda.synchronize()


@pytest.mark.parametrize("numel", [10, 70_000])
def test_a_captured_call_clears_no_counter(numel: int) -> None:
    """It has counters of its own, which each replay leaves at 0."""
    runtime = importlib.import_module("sitecustomize").RUNTIME
    params = [parameter(torch.empty(numel, device="cuda")) for _ in range(2)]
    gradclip_ext.clip_grad_norm_(params, 1.0, 1.0, backend="cuda")  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        runtime.cudaEmulatorFail(b"cudaMemsetAsync", 1, 2)
        norms = [gradclip_ext.clip_grad_norm_(p, float(numel), 1.0, backend="cuda") for p in params]
        runtime.cudaEmulatorFail(b"cudaMemsetAsync", 0, 0)
    for value in (3.0, 0.5, 4.0):
        for param in params:
            param.grad.fill_(value)
        graph.replay()
        gradclip_ext.get_total_norm([params[0].grad], backend="cuda")  # beside it, by the stream's counter
        for param, norm in zip(params, norms):
            assert norm.item() == value * numel
            assert param.grad.unique().tolist() == pytest.approx([min(value, 1.0)])


MORE_CALLS_THAN_COUNTERS = """
import ctypes, torch, gradclip_ext

runtime = ctypes.CDLL(None)
param = torch.nn.Parameter(torch.empty(70_000, device="cuda"))
param.grad = torch.full((70_000,), 2.0, device="cuda")
norms = lambda count: [gradclip_ext.get_total_norm([param.grad], 1.0, backend="cuda") for _ in range(count)]
norms(1)
for _ in range(9):
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        norms(2000)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = [*norms(2), gradclip_ext.clip_grad_norm_(param, 70_000.0, 1.0, backend="cuda"), *norms(1)]
for value in (3.0, 5.0):
    param.grad.fill_(value)
    graph.replay()
    print([round(norm.item() / 70_000, 5) for norm in captured], round(param.grad.mean().item(), 5))
print(norms(1)[0].isfinite().item())  # by the counter that this stream has had from the beginning
with torch.cuda.stream(torch.cuda.Stream()):
    print(round(norms(2)[1].item() / 70_000, 5))
    runtime.cudaEmulatorFail(b"cudaMemsetAsync", 1, 2)
    try:
        norms(1)
    except RuntimeError as error:
        print(error)
"""


def test_more_calls_than_counters() -> None:
    """Captured calls, and streams, that get no counter clear one before every norm."""
    out = run_python("-c", MORE_CALLS_THAN_COUNTERS, timeout=200)
    replays = "[3.0, 3.0, 3.0, 1.0] 1.0\n[5.0, 5.0, 5.0, 1.0] 1.0\n"
    assert out == replays + "True\n1.0\nCUDA error: emulated CUDA error 2\n"
