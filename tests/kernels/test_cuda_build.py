"""A build with CUDA kernels: what it holds, and how it behaves where no GPU can run it."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from cases import clones, grads_of, parameters
from oracle import assert_same_bits
from toolkit import find_cuobjdump, missing

from gradclip_ext import _core, backends, clip_grad_norm_, info

if _core.C is None or _core.BUILT_FOR_CUDA is None:
    missing(f"this build has no CUDA kernels: {_core.REASON or 'built for the CPU'}")

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@NO_GPU
def test_info_tells_what_was_built() -> None:
    (line,) = [entry for entry in info.report().splitlines() if entry.split()[:2] == ["cuda", "cuda"]]
    assert f"built for CUDA {torch.version.cuda}" in line and "no CUDA device is visible" in line


@NO_GPU
def test_insisting_on_cuda_says_why_not() -> None:
    params = parameters((3,))
    before = clones(grads_of(params))
    with pytest.raises(RuntimeError, match="its kernels run on NVIDIA GPUs"):
        clip_grad_norm_(params, 0.1, backend="cuda")
    assert_same_bits(params[0].grad, before[0])
    assert "no CUDA device" in str(backends.ALL["cuda"].why_unavailable(torch.device("cuda")))


def test_cuda_kernels_leave_cpu_tensors_alone() -> None:
    assert _core.C is not None
    params, kernels = parameters((3,), (0,)), _core.C.cuda
    before = clones(grads_of(params))
    assert kernels.clip_grad_norm_(params, 0.1, 2.0, False) is None
    assert kernels.clamp_grad_(params, -0.1, 0.1) is False
    assert kernels.clip_grads_with_norm_(params, 0.1, torch.tensor(5.0)) is False
    assert kernels.norm(grads_of(params), 2.0) == (None, [0, 1])
    assert kernels.scale_(grads_of(params), torch.tensor(0.5)) == [0, 1]
    assert kernels.clamp_(grads_of(params), -0.1, 0.1) == [0, 1]
    for param, old in zip(params, before):
        assert_same_bits(param.grad, old)


def test_the_binary_holds_what_it_says() -> None:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        missing("no cuobjdump: neither the CUDA toolkit nor Triton's wheel has one here")
    path = _core.C.__file__

    def listed(option: str) -> set[str]:
        out = subprocess.run([cuobjdump, option, path], capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"sm_(\d+)", out))

    assert _core.ARCHITECTURES is not None
    built, _, ptx = _core.ARCHITECTURES.partition("+")
    numbers = [entry.replace(".", "") for entry in built.split(";")]
    assert listed("--list-elf") == set(numbers)
    assert listed("--list-ptx") == ({numbers[-1]} if ptx else set())
