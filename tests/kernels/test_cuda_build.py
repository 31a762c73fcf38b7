"""A build with CUDA kernels: what it holds, and how it behaves where no GPU can run it."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from cases import clones, grads_of, parameters
from oracle import assert_same_bits
from toolkit import find_cuobjdump, missing

from gradclip_ext import _extension, backends, clip_grad_norm_, info

if _extension.C is None or _extension.BUILT_FOR_CUDA is None:
    missing(f"this build has no CUDA kernels: {_extension.REASON or 'built for the CPU'}")

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

pytestmark = pytest.mark.toolkit


@NO_GPU
def test_info_tells_what_was_built() -> None:
    (line,) = [entry for entry in info.report().splitlines() if entry.split()[:2] == ["cuda", "cuda"]]
    assert f"built with CUDA {_extension.BUILT_FOR_CUDA}" in line and "no CUDA device is visible" in line


@NO_GPU
def test_insisting_on_cuda_says_why_not() -> None:
    params = parameters((3,))
    before = clones(grads_of(params))
    with pytest.raises(RuntimeError, match="its kernels run on NVIDIA GPUs"):
        clip_grad_norm_(params, 0.1, backend="cuda")
    assert_same_bits(params[0].grad, before[0])
    assert "no CUDA device" in str(backends.ALL["cuda"].why_unavailable(torch.device("cuda")))


def test_the_binary_holds_what_it_says() -> None:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        missing("no cuobjdump: neither the CUDA toolkit nor Triton's wheel has one here")
    path = _extension.C.__file__

    def listed(option: str) -> set[str]:
        out = subprocess.run([cuobjdump, option, path], capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"sm_(\d+)", out))

    assert _extension.ARCHITECTURES is not None
    entries = [entry.replace(".", "").partition("+") for entry in _extension.ARCHITECTURES.split(";")]
    assert listed("--list-elf") == {number for number, _, _ in entries}
    assert listed("--list-ptx") == {number for number, plus, _ in entries if plus}


def test_the_cuda_runtime_is_inside() -> None:
    """A library of torch's would fit one major version of CUDA only."""
    linked = subprocess.run(["ldd", _extension.C.__file__], capture_output=True, text=True, check=True).stdout
    assert "cudart" not in linked and "torch" not in linked, linked
