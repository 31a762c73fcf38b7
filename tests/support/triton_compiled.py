"""Run by test_triton_compiled.py in a process of its own: compile for a GPU that this machine need not have.

    python triton_compiled.py FOLDER cuda|hip

FOLDER holds Triton's cache. Compiles for sm_90 or for gfx942. Prints one JSON object: for every
kernel and dtype the accesses to global memory in its PTX or GCN, for sm_90 also the conversions to
float64, divisions and roots that are not rounded correctly, how many 16-byte loads its machine
code has in flight, its registers and its bytes of local memory (which hold what is spilled); and how
many binaries several lists, orders and bounds need.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_CACHE_DIR"] = sys.argv[1]

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gradclip_ext.backends.base import TensorList
from gradclip_ext.backends.triton import TritonBackend, memory
from gradclip_ext.backends.triton.launch import Launch, Launcher
from gradclip_ext.norms import REPORT, AdaptiveRule, Rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TARGET = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}[sys.argv[2]]
driver.set_active(
    SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: TARGET,
    )
)


class Recorder(Launcher):
    """Compiles every launch, as the launcher does, and keeps the binary instead of launching it."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled: dict[str, Any] = {}
        assert self.load() is None and not self.is_interpreted

    def _start_of(self, launch: Launch, changing: tuple[Any, ...]) -> Callable[..., None]:
        named = {**launch.constants, **launch.options, "grid": (1,)}
        binary = launch.kernel.warmup(*changing, *launch.arguments, **named)
        name = launch.kernel.__name__
        if name == "adaptive_kernel":
            name += f" {launch.constants['COLS']}"
        self.compiled[name] = binary
        return lambda *changing: None


def operations(
    grads: list[torch.Tensor], p: float = 2.0, bound: float = 1.0, coef: float = 0.5
) -> dict[str, Any]:
    """Return the binaries that all operations together use for a list."""
    backend = TritonBackend()
    backend._launcher = recorder = Recorder()
    memory._workspaces.clear()
    with memory.prepared(TensorList(grads)) as (workspace, _):
        workspace.warp_size = TARGET.warp_size
    dtype = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    backend.norm(TensorList(grads), p, REPORT, torch.float64)
    zeroing = Rule(torch.tensor(1.0, dtype=grads[0].dtype), zero_if_nonfinite=True)
    backend.norm(TensorList(grads), p, zeroing, dtype)
    backend.norm(TensorList(grads), p, Rule(1.0), dtype)
    backend.clip_each_(TensorList(grads), p, zeroing, dtype)
    backend.statistics(TensorList(grads), p)
    of_units = TensorList([torch.ones(2, length, dtype=grads[0].dtype) for length in (3, 100, 1000)])
    backend.clip_adaptive_(of_units, of_units, AdaptiveRule(p, coef, bound))
    backend.scale_(TensorList(grads), torch.tensor(coef))
    backend.clamp_(TensorList(grads), -bound, bound)
    return recorder.compiled


def counted(pattern: str, text: str) -> dict[str, int]:
    return dict(collections.Counter(re.findall(pattern, text)))


def described(binary: Any) -> dict[str, Any]:
    if TARGET.backend == "hip":
        accesses = counted(r"(?:global|flat)_(?:load|store)_\w+", binary.asm["amdgcn"])
        return {"accesses": accesses}
    ptx = binary.asm["ptx"]
    return {
        "accesses": counted(r"(?:ld|st)\.global[.\w:]*", ptx),
        "to_float64": sum(counted(r"cvt[.\w]*\.f64\.(?:f32|f16|bf16)", ptx).values()),
        "approximate": counted(r"(?:div|rcp|sqrt)\.(?:full|approx)[.\w]*", ptx),
        **described_by_cubin(binary.asm["cubin"]),
    }


def described_by_cubin(cubin: bytes) -> dict[str, Any]:
    """Return what Triton's copies of NVIDIA's tools tell, or None for everything if it has none."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "nvdisasm").exists() or not (tools / "cuobjdump").exists():
        return {"in_flight": None, "registers": None, "local_bytes": None}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output_of(tool: str, option: str) -> str:
            command = [tools / tool, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        sass, usage = output_of("nvdisasm", "-c"), output_of("cuobjdump", "-res-usage")
    registers, stack, local = (
        int(re.findall(rf"{key}:(\d+)", usage)[-1]) for key in ("REG", "STACK", "LOCAL")
    )
    return {"in_flight": loads_in_flight(sass), "registers": registers, "local_bytes": stack + local}


def loads_in_flight(sass: str) -> int:
    """Return the largest number of 16-byte loads without a store, barrier or branch in between."""
    longest = run = 0
    for opcode in re.findall(r"(LDG\.E\.128|STG|BAR|BRA)", sass):
        run = run + 1 if opcode == "LDG.E.128" else 0
        longest = max(longest, run)
    return longest


def main() -> None:
    report: dict[str, Any] = {"kernels": {}}
    for dtype, p in itertools.product(DTYPES, (2.0, 3.0)):
        for name, binary in operations([torch.ones(5, dtype=dtype)], p).items():
            if p == 2.0 or not name.startswith(("scale", "clamp")):
                report["kernels"][f"{name} {dtype} p={p}"] = described(binary)
    lists = [[torch.ones(3) for _ in range(n)] for n in (1, 2, 16, 17, 300)] + [[torch.ones(2**21 + 1)]]
    report["binaries"] = {
        name: len({id(binaries[name]) for binaries in [operations(grads) for grads in lists]})
        for name in operations(lists[0])
    }
    report["orders"] = len({id(operations(lists[0], p)["norm_kernel"]) for p in (0.5, 3.0, 0.1, 7.0, 4.0)})
    report["bounds"] = len({id(operations(lists[0], bound=b)["clamp_kernel"]) for b in (0.0, 1.0, 0.3, 1e30)})
    print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if "lld not found" not in str(error):
            raise
        print(json.dumps({"missing": f"Triton {triton.__version__} has no linker for AMD: {error}"}))
