"""The kernels of gpu_probes.cu, built with nvcc on first use, on torch tensors and the current stream."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.plan import OUT

TILE = 1 << 16  # read() and update() need buffers of a multiple of this size
# As many loads in flight, and blocks per multiprocessor, as in csrc/cuda.
USUAL_LOADS, USUAL_BLOCKS = 8, 8
MAX_BLOCKS = 16
# The tensors that the tables of a launch hold: 4 KB, 8.5 KB and 32 KB of parameters.
TABLES = {281: "4 KB", 610: "8.5 KB", 2329: "32 KB"}
SMALL, LARGE = 281, 2329
_SOURCE = Path(__file__).with_name("gpu_probes.cu")
_CSRC = Path(__file__).parents[1] / "csrc"
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as enum DType
_OPERATIONS = {"norm": 0, "scale": 1, "clamp": 2}
_SCRATCH = 1 << 19  # partial results: of 32 GB


@dataclass(frozen=True)
class Listed:
    """A list of equal tensors in one buffer.

    Args:
        buffer: holds them all; its dtype is theirs.
        tensors: how many.
        numel: of each.
        stride: elements from the start of one to that of the next.
    """

    buffer: Tensor
    tensors: int
    numel: int
    stride: int

    def __post_init__(self) -> None:
        assert self.buffer.numel() >= (self.tensors - 1) * self.stride + self.numel


def alone(x: Tensor) -> Listed:
    """Return the list of this tensor alone."""
    return Listed(x, 1, x.numel(), x.numel())


class Probes:
    """The compiled probes.

    Args:
        device: where the tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self._library = ctypes.CDLL(str(build()))
        properties = torch.cuda.get_device_properties(device)
        self.processors = int(properties.multi_processor_count)
        self.can_depend = torch.cuda.get_device_capability(device) >= (9, 0)  # else all launches are plain
        self._sums = torch.empty(256 * MAX_BLOCKS * self.processors, device=device)
        self._scratch = torch.zeros(_SCRATCH, dtype=torch.float64, device=device)
        self.results = torch.zeros(2, device=device)  # the norm and the coefficient of a list
        self._out = torch.zeros(1, dtype=torch.int32, device=device)

    def read(self, x: Tensor, loads: int = USUAL_LOADS, blocks: int = USUAL_BLOCKS) -> None:
        """Sum the squares of a float32 buffer."""
        self._call("probe_read", x, _size(x), loads, blocks * self.processors, self._sums)

    def update(
        self,
        x: Tensor,
        coef: Tensor,
        loads: int = USUAL_LOADS,
        blocks: int = USUAL_BLOCKS,
        *,
        reverse: bool = False,
        dependent: bool = True,
    ) -> None:
        """Multiply by a device coefficient, unless that is 1: then return at once."""
        grid = blocks * self.processors
        self._call(
            "probe_update", x, _size(x), loads, grid, coef, int(reverse), int(dependent and self.can_depend)
        )

    def read_then_update(self, x: Tensor, coef: Tensor, *, reverse: bool = False) -> None:
        """What clipping by norm does to memory."""
        self.read(x)
        self.update(x, coef, reverse=reverse)

    def run(
        self,
        operation: str,
        listed: Listed,
        *,
        max_norm: float = 1.0,
        table: int = SMALL,
        blocks: int = USUAL_BLOCKS,
        dependent: bool = True,
    ) -> None:
        """Launch one of the package's kernels: "norm", "scale" by the coefficient in results, or "clamp"."""
        x, grid = listed.buffer, blocks * self.processors
        sizes = (listed.tensors, listed.numel, listed.stride * x.itemsize)
        self._call(
            "probe_list", _OPERATIONS[operation], x, *map(ctypes.c_int64, sizes), _DTYPES[x.dtype], table,
            ctypes.c_double(max_norm), grid, int(dependent and self.can_depend), self._scratch, self.results,
        )  # fmt: skip

    def clip(self, listed: Listed, *, max_norm: float, table: int = SMALL, dependent: bool = True) -> None:
        """Launch a norm, and scaling by its coefficient."""
        for operation in ("norm", "scale"):
            self.run(operation, listed, max_norm=max_norm, table=table, dependent=dependent)

    def parameters(self, table: int) -> None:
        """Launch one block with the parameters that a table takes."""
        self._call("probe_parameters", table, self._out)

    def _call(self, name: str, *arguments: Tensor | ctypes.c_int64 | ctypes.c_double | int) -> None:
        converted = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(self._library, name)(*converted, stream)
        if error:
            raise RuntimeError(f"{name} failed with CUDA error {error}")


def build() -> Path:
    """Compile the probes unless that is done, and return the library.

    Raises:
        FileNotFoundError: there is no nvcc.
        subprocess.CalledProcessError: it did not compile.
    """
    library = OUT / "gpu_probes.so"
    sources = [_SOURCE, *_CSRC.glob("c*/*.*")]
    if library.exists() and library.stat().st_mtime >= max(s.stat().st_mtime for s in sources):
        return library
    if shutil.which("nvcc") is None:
        raise FileNotFoundError(
            f"nvcc is not on PATH: install the CUDA toolkit, or copy a compiled {library.name} to {OUT}"
        )
    OUT.mkdir(exist_ok=True)
    target = "-arch=native" if torch.cuda.is_available() else "-arch=sm_90"
    options = ["-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", f"-I{_CSRC}", target]
    subprocess.run(["nvcc", *options, "-o", str(library), str(_SOURCE)], check=True)
    return library


def _size(x: Tensor) -> ctypes.c_int64:
    return ctypes.c_int64(x.numel() * x.itemsize)
