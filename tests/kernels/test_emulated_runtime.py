"""That the emulated GPU notices what it is there to notice. `make check-cuda` runs the suite on it."""

from __future__ import annotations

import importlib

import pytest
import torch
from subprocesses import run_python

import gradclip_ext

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


WRITES_TOO_FAR = """
import ctypes, torch
tensor = torch.empty(100, dtype=torch.uint8, device="cuda")
ctypes.memset(tensor.data_ptr() + 100, 0, 1)
del tensor
"""


def test_a_write_behind_an_allocation_ends_the_process() -> None:
    with pytest.raises(AssertionError, match="behind the end of an allocation"):
        run_python("-c", WRITES_TOO_FAR, timeout=100, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


WAITS_IN_A_CAPTURE = """
import torch
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    {}
"""


@pytest.mark.parametrize("call", ["torch.cuda.synchronize()", "torch.ones(2, device='cuda').cpu()"])
def test_a_capture_refuses_to_wait(call: str) -> None:
    """In a process of its own: torch's allocator does not get over a capture that failed."""
    with pytest.raises(AssertionError, match=r"called a synchronizing CUDA operation|emulated CUDA error 90"):
        run_python("-c", WAITS_IN_A_CAPTURE.format(call), timeout=100)
