"""Every CPU kernel of every instruction set, called directly on memory with chosen alignment."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import name_of
from cases import over_real_dtypes as over_dtypes
from torch import Tensor

testing = pytest.importorskip(
    "gradclip_ext._testing", reason="gradclip_ext._testing is not built", exc_type=ImportError
)

over_instruction_sets = pytest.mark.parametrize("isa", testing.instruction_sets())


def run(isa: str, kernel: str, x: Tensor, *arguments: float) -> float:
    value: float = testing.run_kernel(isa, kernel, name_of(x.dtype), x.data_ptr(), x.numel(), *arguments)
    return value


def placed(values: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Return a copy that starts ``shift`` elements past a 64-byte boundary, and the memory around it."""
    around = torch.full((values.numel() + 160,), 42.0, dtype=values.dtype)
    start = (-around.data_ptr() // values.itemsize) % (64 // values.itemsize) + 64 // values.itemsize + shift
    inside = around[start : start + values.numel()]
    inside.copy_(values)
    return inside, around


def values_of(dtype: torch.dtype, numel: int) -> Tensor:
    return torch.randn(numel, dtype=torch.float64).mul(8).to(dtype)


SIZES = [*range(0, 70), 95, 127, 128, 129, 1000, 1023, 1024, 1025, 2500, 16384]
REDUCTIONS: dict[str, tuple[tuple[float, ...], Callable[[Tensor], Tensor]]] = {
    "sum_squares": ((), lambda x: x.square().sum()),
    "sum_magnitudes": ((), lambda x: x.abs().sum()),
    "max_magnitude": ((), lambda x: x.abs().amax() if x.numel() else x.sum()),
    "sum_powers": ((2.5, 3.0), lambda x: (x.abs() / 3).pow(2.5).sum()),
}


@over_instruction_sets
@over_dtypes
@pytest.mark.parametrize("kernel", REDUCTIONS)
def test_reductions(isa: str, dtype: torch.dtype, kernel: str) -> None:
    arguments, exact = REDUCTIONS[kernel]
    exact_kernel = dtype == torch.float64 or kernel in ("sum_powers", "max_magnitude")
    tolerance = 1e-13 if exact_kernel else 16 * 2**-24
    for numel in SIZES:
        values = values_of(dtype, numel)
        expected = exact(values.double()).item()
        found = {run(isa, kernel, placed(values, shift)[0], *arguments) for shift in (0, 1, 3)}
        assert len(found) == 1, f"{numel} elements: the bits depend on the address: {found}"
        assert math.isclose(found.pop(), expected, rel_tol=tolerance), numel


@over_instruction_sets
@over_dtypes
def test_statistics(isa: str, dtype: torch.dtype) -> None:
    """The sum has the bits of sum_squares; what pads the last row is not counted."""
    for numel in SIZES[1:]:
        for factor in (1.0, 0.0, 1e-25, 1e-4):
            values = values_of(dtype, numel).mul_(factor)
            values[torch.rand(numel) < 0.2] = 0.0
            values[torch.rand(numel) < 0.1] = -0.0
            for special in (None, math.inf, -math.inf, math.nan):
                if special is not None:
                    values[int(torch.randint(numel, ()))] = special
                x = placed(values, numel % 4)[0]
                squares = run(isa, "sum_squares", x)
                found = run(isa, "statistics.sum_squares", x)
                assert found == squares or (math.isnan(found) and math.isnan(squares)), numel
                largest, expected = run(isa, "statistics.largest", x), run(isa, "max_magnitude", x)
                assert largest == expected or (math.isnan(largest) and math.isnan(expected)), numel
                assert run(isa, "statistics.zeros", x) == int((x == 0).sum()), numel
                assert run(isa, "statistics.nonfinite", x) == int((~x.isfinite()).sum()), numel


@over_instruction_sets
@over_dtypes
@pytest.mark.parametrize("kernel", REDUCTIONS)
def test_reductions_see_every_nonfinite_value(isa: str, dtype: torch.dtype, kernel: str) -> None:
    arguments, _ = REDUCTIONS[kernel]
    for numel in (1, 5, 64, 97, 1100):
        for index in {0, numel // 2, numel - 1}:
            values = values_of(dtype, numel)
            values[index] = -math.inf
            assert run(isa, kernel, values, *arguments) == math.inf
            values[(index + 1) % numel] = math.nan
            assert math.isnan(run(isa, kernel, values, *arguments))


@over_instruction_sets
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-30, 1e-20, 1e-15, 1e10, 1e20, 3e38])
def test_sums_beyond_the_range_of_float32(isa: str, scale: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.rand(3000, dtype=torch.float64).mul(scale).to(dtype)
        for kernel in ("sum_squares", "sum_magnitudes"):
            expected = REDUCTIONS[kernel][1](values.double()).item()
            assert math.isclose(run(isa, kernel, values), expected, rel_tol=1e-6)


@over_instruction_sets
@pytest.mark.parametrize("p", [0.01, 0.5, 3.0, 7.3, 50.0, 1000.0])
def test_powers_are_accurate_over_the_range_of_float64(isa: str, p: float) -> None:
    for scale in (5e-324, 1e-310, 1e-300, 1.0, 1e300):
        values = torch.rand(100, dtype=torch.float64) * scale
        largest = values.amax().item()
        if largest > 0:
            total = run(isa, "sum_powers", values, p, largest)
            ratios = [v / largest for v in values.tolist()]
            expected = math.fsum(r**p for r in ratios)
            assert math.isclose(total, expected, rel_tol=1e-15 * (20 + p))


def all_values(dtype: torch.dtype) -> Tensor:
    """Return every bit pattern of a 16-bit dtype, or a spread of patterns of a wider one."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    bits = torch.int32 if dtype.itemsize == 4 else torch.int64
    info = torch.iinfo(bits)
    return torch.randint(info.min, info.max, (2**16,), dtype=bits).view(dtype)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, signs of zeros included, but for what a NaN carries."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    kept = ~expected.isnan()
    assert torch.equal(found.signbit() & kept, expected.signbit() & kept)


@over_instruction_sets
@over_dtypes
def test_scale_rounds_once(isa: str, dtype: torch.dtype) -> None:
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for coef in (0.0, 1e-30, 0.3, 0.7548828125, 1 - 2**-24, math.nan):
        values = all_values(dtype)
        found = values.clone()
        run(isa, "scale", found, coef)
        assert_same(found, (values.to(compute_dtype) * torch.tensor(coef, dtype=compute_dtype)).to(dtype))


@over_instruction_sets
@over_dtypes
def test_clamp_is_torch_clamp(isa: str, dtype: torch.dtype) -> None:
    for low, high in ((-1.0, 1.0), (-0.1, 2.7), (0.0, math.inf), (-math.inf, -3.0), (-0.0, 0.0), (5.0, 5.0)):
        values = all_values(dtype)
        found = values.clone()
        run(isa, "clamp", found, low, high)
        expected = values.clamp(low, high)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@over_instruction_sets
@over_dtypes
@pytest.mark.parametrize("kernel", ["scale", "clamp"])
def test_updates_touch_their_elements_only(isa: str, dtype: torch.dtype, kernel: str) -> None:
    arguments = (0.5,) if kernel == "scale" else (-1.0, 1.0)
    for numel in SIZES:
        for shift in (0, 1, 3):
            values = values_of(dtype, numel)
            inside, around = placed(values, shift)
            run(isa, kernel, inside, *arguments)
            expected = values * 0.5 if kernel == "scale" else values.clamp(-1, 1)
            assert torch.equal(inside, expected), (numel, shift)
            inside.fill_(42)
            assert (around == 42).all(), (numel, shift)


UNITS = [(units, length) for units in (1, 3, 4, 5, 31, 63, 64) for length in (1, 2, 3, 7, 9, 16, 25, 31, 32)]


@over_instruction_sets
@over_dtypes
def test_sums_of_short_units(isa: str, dtype: torch.dtype) -> None:
    for units, length in UNITS:
        values = values_of(dtype, units * length)
        if length > 1:
            values[length - 1] = math.nan  # in the first unit alone
        for shift in (0, 1, 3):
            inside, _ = placed(values, shift)
            found = testing.unit_sums(isa, name_of(dtype), inside.data_ptr(), units, length)
            expected = values.double().view(units, length).square().sum(1)
            found = torch.tensor(found, dtype=torch.float64)
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=0, equal_nan=True)


@over_instruction_sets
@over_dtypes
def test_scaling_of_short_units(isa: str, dtype: torch.dtype) -> None:
    """Each has the bits that its own coefficient gives it, and memory around them is not touched."""
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    patterns = all_values(dtype)
    for units, length in UNITS:
        values = patterns[torch.randint(len(patterns), (units * length,))]
        coefs = [[1.0, 0.0, 0.3, 1e-30][i % 4] for i in range(units)]
        for shift in (0, 1, 3):
            inside, around = placed(values, shift)
            testing.scale_units(isa, name_of(dtype), inside.data_ptr(), length, coefs)
            factors = torch.tensor(coefs, dtype=compute_dtype).repeat_interleave(length)
            assert_same(inside, (values.to(compute_dtype) * factors).to(dtype))
            inside.fill_(42)
            assert (around == 42).all(), (units, length, shift)


@pytest.mark.skipif("libasan" not in os.environ.get("LD_PRELOAD", ""), reason="runs in make test-sanitize")
@over_instruction_sets
@pytest.mark.parametrize("kernel", ["sum_squares", "max_magnitude", "scale", "clamp"])
def test_a_planted_overrun_is_caught(isa: str, kernel: str, tmp_path: Path) -> None:
    code = f"""
import torch
from gradclip_ext import _testing
x = torch.zeros(100)
run = lambda numel: _testing.run_kernel({isa!r}, {kernel!r}, "float32", x.data_ptr(), numel, 1.0, 1.0)
run(100)
print("so far so good", flush=True)
run(101)
"""
    # In another folder, because `python -c` in the checkout would import the build beside the sources.
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "so far so good" in done.stdout, done.stderr
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr
