"""The machine code that Triton compiles, for GPUs that this machine need not have, in a process of its own.

Without the hint of alignment, for example, a tile is loaded two bytes at a time, and values stay right.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from subprocesses import run_with_triton
from toolkit import TESTS
from triton_fakes import KERNELS, SEGMENT_KERNELS

pytestmark = [
    pytest.mark.toolkit,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton"
    ),
]


# 16-byte loads of one tile.
IN_FLIGHT = {
    **dict.fromkeys(("norm_kernel", "statistics_kernel"), 8),
    **dict.fromkeys(("scale_kernel", "scale_each_kernel", "clamp_kernel"), 4),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where Triton keeps what it has compiled: most kernels are looked at by two scripts."""
    return tmp_path_factory.mktemp("triton_cache")


@pytest.fixture(scope="module")
def compiled(cache: Path) -> dict[str, Any]:
    """What triton_compiled.py found, for sm_90."""
    return compiled_for("cuda", cache)


def compiled_for(target: str, folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(
        run_with_triton(TESTS / "support" / "triton_compiled.py", folder, target, timeout=600)
    )
    return report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_memory_is_accessed_16_bytes_at_a_time(compiled: dict[str, Any], dtype: torch.dtype) -> None:
    """Besides the 16-byte accesses there are those for unaligned and for cut elements, and no more."""
    vector_type = "v2.b64" if dtype == torch.float64 else "v4.b32"
    narrow, vec = f"b{8 * dtype.itemsize}", 16 // dtype.itemsize
    # Sums load tiles of so many vectors per lane: 8 to sum; if the sum is out of range, 8 for the largest
    # magnitude and 1 to sum again. The sum of a float16 tile is never out of range.
    tiles = [8] if dtype == torch.float16 else [8, 8, 1]
    for name, sums in (
        (f"norm_kernel {dtype} p=2.0", tiles),
        (f"norm_kernel {dtype} p=3.0", [8, 1]),
        (f"statistics_kernel {dtype} p=2.0", [8, 8, 1]),
        (f"scale_kernel {dtype} p=2.0", []),
        (f"clamp_kernel {dtype} p=2.0", []),
        (f"scale_each_kernel {dtype} p=2.0", []),
    ):
        # A tile is loaded in one of three ways: whole; cut by the tensor's end, which takes the elements of a
        # vector besides; or unaligned, by elements. In place it has 4 vectors and is whole or cut, and a lane
        # has one element before or after all tiles.
        loads = 2 * sum(sums) if sums else 2 * 4
        elements = vec * (sum(sums) + len(sums)) if sums else 1
        stores, stored_elements = (0, 0) if sums else (2 * 4, 1)
        accesses = compiled["kernels"][name]["accesses"]
        assert accesses.get(f"ld.global.{vector_type}", 0) == loads, (name, accesses)
        assert accesses.get(f"st.global.{vector_type}", 0) == stores, (name, accesses)
        # A table has 64-bit entries, coefficients are in the norms' dtype, partials are float64.
        others = {"b64": 7} | ({"b32": 1} if name.startswith("scale_kernel") else {})
        if name.startswith("scale_each"):  # the first coefficient, that of a tensor, and its position
            others = {"b64": 8, "b32": 2} if dtype != torch.float64 else {"b64": 10}
        assert accesses.get(f"ld.global.{narrow}", 0) == elements + others.get(narrow, 0), (name, accesses)
        others = {"b64": 2 if name.startswith("norm") else 5} if sums else {}
        expected = stored_elements + others.get(narrow, 0)
        assert accesses.get(f"st.global.{narrow}", 0) == expected, (name, accesses)


def test_memory_is_accessed_16_bytes_at_a_time_on_amd(cache: Path) -> None:
    """ROCm: the kernels compile for gfx942, and access memory in the expected way."""
    report = compiled_for("hip", cache)
    if "missing" in report:
        pytest.skip(report["missing"])
    for name, found in report["kernels"].items():
        accesses = found["accesses"]
        if not name.startswith("finalize") and not (name.startswith("adaptive") and " 1024 " not in name):
            # Whole tiles, and those that a tensor's end cuts.
            loads = 2 * IN_FLIGHT.get(name.split()[0], 2)
            assert accesses.get("global_load_dwordx4", 0) >= loads, (name, accesses)
        if name.startswith(("scale", "clamp")):
            assert accesses.get("global_store_dwordx4", 0) >= 2 * 4, (name, accesses)


def test_no_element_is_converted_to_float64(compiled: dict[str, Any]) -> None:
    """A GPU with little float64 converts as fast as it reads only if 8 elements share a conversion."""
    for name, found in compiled["kernels"].items():
        if "p=2.0" not in name or "float64" in name:
            continue
        vec = 4 if "float32" in name else 8
        # A column of 8 vectors takes one conversion per element of a vector; as many when a chunk is
        # summed again, a row at a time, and one for its largest element.
        allowed = 2 * vec + 1 if name.startswith(("norm", "statistics")) else 0
        if name.startswith("adaptive"):
            # Twice, for gradients and weights: for each unit one sum and its largest element, and when units
            # are summed again a quarter of a tile.
            allowed = 40
        elif name.startswith("finalize_each"):
            allowed = 1  # the limit
        assert found["to_float64"] <= allowed, (name, found)


def test_the_coefficient_is_rounded_as_torchs(compiled: dict[str, Any]) -> None:
    """Triton's own float32 division is approximate."""
    for name, found in compiled["kernels"].items():
        if "p=2.0" in name:
            assert found["approximate"] == {}, (name, found)


def test_loads_of_a_tile_are_in_flight_together(compiled: dict[str, Any]) -> None:
    """ptxas likes to put arithmetic and stores between them."""
    for name, found in compiled["kernels"].items():
        if found["in_flight"] is None:
            pytest.skip("this Triton brings no nvdisasm")
        assert found["in_flight"] >= IN_FLIGHT.get(name.split()[0], 0), (name, found)


def test_no_registers_are_spilled(compiled: dict[str, Any]) -> None:
    """But for a few addresses, outside of loops over elements, where ptxas makes room for a program more."""
    for name, found in compiled["kernels"].items():
        if found["registers"] is None:
            pytest.skip("this Triton brings no cuobjdump")
        spills = name.startswith("adaptive") or "p=3" in name
        assert found["registers"] < 255 and found["local_bytes"] <= (48 if spills else 0), (name, found)


def test_one_binary_for_lists_of_any_length_orders_and_bounds(compiled: dict[str, Any]) -> None:
    assert set(compiled["binaries"].values()) == {1}, compiled["binaries"]
    assert compiled["orders"] == compiled["bounds"] == 1


def test_launches_are_triton_s_own_and_take_a_fraction_of_the_time(cache: Path) -> None:
    """A launcher reads as many arguments as its kernel has, however many are passed."""
    found = json.loads(run_with_triton(TESTS / "support" / "triton_launched.py", cache, timeout=600))
    names = (*KERNELS, *SEGMENT_KERNELS)
    assert found["same"] == dict.fromkeys(names, True)
    # Reading the list, the norm's rule and three launches: Triton's own way takes 60 us for the launches.
    if found["compiled_module"]:
        assert found["host_us"]["read by the module"] < found["host_us"]["read by Python"] / 2, found
