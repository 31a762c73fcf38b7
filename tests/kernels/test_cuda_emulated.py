"""The CUDA kernels' logic, run on the CPU by cuda_emulator/: needs the toolkit's headers, no GPU.

What a GPU decides (speed, memory order between blocks) is not tested here.
"""

from __future__ import annotations

import ctypes
import math
import subprocess

import pytest
import torch
from toolkit import ROOT, find_toolkit

from gradclip_ext import reference
from gradclip_ext.norms import Rule

TOOLKIT = find_toolkit()
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as enum DType
HALVES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK_BYTES = 65536
# Much less than the 5.4e-7 that reduce.cuh derives as the largest error of a norm, and than what rounding the
# result to float32 adds: the roundings of these inputs do not all have one sign.
NORM_TOLERANCE = 3e-7

pytestmark = [
    pytest.mark.toolkit,
    pytest.mark.skipif(TOOLKIT is None, reason="no CUDA headers on this machine"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulator") / "kernels.so"
    source = ROOT / "tests" / "cuda_emulator" / "kernels.cpp"
    flags = ["-std=c++17", "-O2", "-fno-strict-aliasing", "-shared", "-fPIC"]
    includes = ["-I", ROOT / "csrc", "-I", TOOLKIT / "include"]
    subprocess.run(["g++", *flags, *includes, source, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.emulated_chunks.restype = ctypes.c_int64
    return loaded


def as_arguments(tensors):
    count = len(tensors)
    return (
        ctypes.c_int64(count),
        (ctypes.c_void_p * count)(*[t.data_ptr() for t in tensors]),
        (ctypes.c_int64 * count)(*[t.numel() for t in tensors]),
        (ctypes.c_int * count)(*[DTYPES[t.dtype] for t in tensors]),
    )


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def norm(kernels, tensors, p=2.0, *, max_norm=1.0, zero_if_nonfinite=False, blocks=3, first_block=0):
    """Return (total_norm, clip_coef); scratch memory is poisoned with NaN before.

    The limit is a number, or a tensor that the kernel reads.
    """
    number, limit, are_float64 = as_limit(max_norm)
    is_float64 = any(t.dtype == torch.float64 for t in tensors)
    listed = as_arguments(tensors)
    partials = torch.full((2 * kernels.emulated_chunks(*listed),), math.nan, dtype=torch.float64)
    results = torch.full((2,), math.nan, dtype=torch.float64 if is_float64 else torch.float32)
    arrivals = torch.zeros(1, dtype=torch.int32)
    kernels.emulated_norm(
        *listed, ctypes.c_double(p), number, limit, are_float64, int(zero_if_nonfinite), int(is_float64),
        blocks, first_block, address(partials), address(arrivals), address(results),
    )  # fmt: skip
    assert arrivals.item() == 0, "the counter is not ready for the next launch"
    return results[0].item(), results[1].item()


def as_limit(max_norm):
    """Return a number, an address, and whether a double is there."""
    if not isinstance(max_norm, torch.Tensor):
        return ctypes.c_double(max_norm), ctypes.c_void_p(), 0
    return ctypes.c_double(math.nan), address(max_norm), int(max_norm.dtype == torch.float64)


def scale_(kernels, tensors, coef, blocks=3, runs=None):
    """Scale by a 0-d coefficient, or by a vector with one for each tensor that is not empty."""
    coefs = address(coef), int(coef.dtype == torch.float64), coef.dim()
    taken = torch.zeros(1, dtype=torch.int32)
    counter = (blocks, None) if runs is None else (runs, address(taken))
    kernels.emulated_scale(*as_arguments(tensors), *coefs, blocks, *counter)
    assert taken.item() == 0, "the counter is not ready for the next launch"


def each(kernels, tensors, p=2.0, *, max_norm=1.0, zero_if_nonfinite=False, blocks=3, first_block=0):
    """Return the norms and coefficients of the tensors that are not empty, and their statistics with the norm
    of all: (norms, coefs, total_norm, rows)."""
    is_float64 = any(t.dtype == torch.float64 for t in tensors)
    number, limit, are_float64 = as_limit(max_norm)
    stride = max_norm.dim() if isinstance(max_norm, torch.Tensor) else 0
    listed, count = as_arguments(tensors), sum(t.numel() > 0 for t in tensors)
    dtype = torch.float64 if is_float64 else torch.float32
    results = torch.full((2, count), math.nan, dtype=dtype)
    statistics = torch.full((1 + 4 * count,), math.nan, dtype=torch.float64)
    for addresses in ((address(results[0]), address(results[1]), None), (None, None, address(statistics))):
        partials = torch.full((4 * kernels.emulated_chunks(*listed),), math.nan, dtype=torch.float64)
        arrivals = torch.zeros(1, dtype=torch.int32)
        kernels.emulated_tensors(
            *listed, ctypes.c_double(p), number, limit, are_float64, stride, int(zero_if_nonfinite),
            int(is_float64), blocks, first_block, address(partials), address(arrivals), *addresses,
        )  # fmt: skip
        assert arrivals.item() == 0, "the counter is not ready for the next launch"
    return *results, statistics[0], statistics[1:].view(4, count)


def clamp_(kernels, tensors, low, high, blocks=3):
    bounds = ctypes.c_double(low), ctypes.c_double(high)
    kernels.emulated_clamp(*as_arguments(tensors), *bounds, blocks)


def gradients(dtypes, sizes=(1, 0, 63, 1000, 4097, 16384, 33000)):
    """One tensor per size, dtypes in turn, every third one not aligned to 16 bytes."""
    made = []
    for index, size in enumerate(sizes):
        shift = 1 if index % 3 == 2 else 0
        values = torch.randn(size + shift) * torch.empty(size + shift).uniform_(-2, 2).exp()
        made.append(values.to(dtypes[index % len(dtypes)])[shift:])
    return made


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 0.5, 3.0, 50.0])
@pytest.mark.parametrize("dtypes", [(d,) for d in DTYPES] + [HALVES, tuple(DTYPES)], ids=str)
def test_norm(kernels, dtypes, p):
    tensors = gradients(dtypes)
    total, coef = norm(kernels, tensors, p, max_norm=0.5)
    expected = reference.total_norm(tensors, p)
    assert total == pytest.approx(expected, rel=NORM_TOLERANCE)
    assert coef == pytest.approx(reference.clip_coef(0.5, total), rel=2e-7)


@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("dtypes", [HALVES, tuple(DTYPES)], ids=str)
def test_the_bits_do_not_depend_on_the_grid_or_on_which_block_is_last(kernels, dtypes, p):
    tensors = gradients(dtypes, sizes=[70000, 5, 64, 33000, 1, 20000])
    first = norm(kernels, tensors, p, blocks=1)
    assert norm(kernels, tensors, p, blocks=4, first_block=2) == first
    assert norm(kernels, tensors, p, blocks=7, first_block=6) == first


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_bits_do_not_depend_on_alignment(kernels, dtype):
    values = torch.randn(20001).to(dtype)
    shifted = torch.zeros(20002, dtype=dtype)[1:].copy_(values)
    assert values.data_ptr() % 16 == 0 != shifted.data_ptr() % 16
    assert norm(kernels, [values]) == norm(kernels, [shifted])


def test_more_tensors_than_a_launch_holds(kernels):
    tensors = [torch.randn(1 + i % 70) for i in range(100)]  # 16 a launch in the emulator
    assert norm(kernels, tensors)[0] == pytest.approx(reference.total_norm(tensors), rel=NORM_TOLERANCE)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtypes", [HALVES, (torch.float64,)], ids=str)
def test_zeros_of_the_other_class_change_no_bit(kernels, dtypes, p):
    """A list's float64 tensors and its others have kernels of their own, and are finalized together."""
    tensors = [t.to(dtypes[i % len(dtypes)]) for i, t in enumerate(torch.randn(40, 1700))]
    zeros = torch.zeros(70000, dtype=torch.float64 if dtypes == HALVES else torch.float32)
    alone = norm(kernels, tensors, p)[0]
    together = norm(kernels, [*tensors[:9], zeros, *tensors[9:], zeros], p)[0]
    # Beside a float64 tensor, the result is not rounded to float32.
    assert (torch.tensor(together).float().item() if dtypes == HALVES else together) == alone


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("size", [1e200, 1e30, 1.0, 1e-30, 1e-200])
@pytest.mark.parametrize("other", [3e38, 1.0, 1e-25, 1e-44, 0.0, math.inf, math.nan])
def test_float64_beside_float32_of_any_size(kernels, p, size, other):
    tensors = [torch.rand(5000), torch.rand(5000, dtype=torch.float64) * size, torch.rand(70000)]
    tensors[0] *= other
    tensors[2] *= other
    total, coef = norm(kernels, tensors, p, max_norm=0.5)
    expected = reference.total_norm(tensors, p)
    assert total == pytest.approx(expected, rel=NORM_TOLERANCE, nan_ok=True)
    assert coef == pytest.approx(reference.clip_coef(0.5, total), rel=1e-15, nan_ok=True)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf(kernels, dtype, p):
    for bad in (math.nan, math.inf, -math.inf):
        for position in (0, 2999):
            tensors = [torch.randn(50).to(dtype), torch.randn(3000).to(dtype)]
            tensors[1][position] = bad
            total, coef = norm(kernels, tensors, p)
            if math.isnan(bad):
                assert math.isnan(total)
                assert math.isnan(coef)
            else:
                assert total == math.inf
                assert coef == 0.0


@pytest.mark.parametrize("size", [1e30, 1e-25, 1e-42])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_what_leaves_the_range_of_float32(kernels, p, size):
    tensors = [torch.rand(5000) * size, torch.zeros(3000), torch.rand(17) * size]
    expected = reference.total_norm(tensors, p)
    # Below 1e-38 a float32 result has few digits left.
    assert norm(kernels, tensors, p)[0] == pytest.approx(expected, rel=1e-6, abs=1.5e-45)


def test_large_and_small_chunks_together(kernels):
    tensors = [torch.full((40000,), 1e-25), torch.full((100,), 1e25)]
    assert norm(kernels, tensors)[0] == pytest.approx(1e26, rel=NORM_TOLERANCE)


def test_zeros(kernels):
    assert norm(kernels, [torch.zeros(5000), torch.zeros(3)]) == (0.0, 1.0)


@pytest.mark.parametrize("dtypes", [(d,) for d in DTYPES] + [tuple(DTYPES)], ids=str)
@pytest.mark.parametrize("coef_dtype", [torch.float32, torch.float64], ids=str)
def test_scale(kernels, dtypes, coef_dtype):
    tensors = gradients(dtypes)
    coef = torch.tensor(0.12345678901, dtype=coef_dtype)
    expected = [torch._foreach_mul([t], coef)[0] for t in tensors]
    scale_(kernels, tensors, coef)
    for ours, wanted in zip(tensors, expected):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("runs", [3, 4, 7, 11, 60])
def test_every_run_of_chunks_is_taken_once(kernels, runs):
    """In each launch of a list, by one of three blocks; in none of them where there is nothing to do."""
    tensors = gradients(HALVES, sizes=[70_000, 5, 33_000, 1] + 20 * [64] + [140_000])
    before = [t.clone() for t in tensors]
    coefs = torch.rand(len(tensors))
    for coef in (torch.tensor(0.5), torch.tensor(1.0), coefs):
        expected = [(t.float() * c).to(t.dtype) for t, c in zip(tensors, coef.expand(len(tensors)))]
        scale_(kernels, tensors, coef, runs=runs)
        for ours, wanted in zip(tensors, expected):
            assert torch.equal(ours, wanted)
    assert not torch.equal(tensors[0], before[0])


def test_a_coefficient_of_one_writes_nothing_and_nan_writes_nan(kernels):
    tensor = torch.randn(5000)
    before = tensor.clone()
    scale_(kernels, [tensor], torch.tensor(1.0))
    assert torch.equal(tensor, before)
    scale_(kernels, [tensor], torch.tensor(math.nan))
    assert tensor.isnan().all()


@pytest.mark.parametrize("coef_dtype", [torch.float32, torch.float64], ids=str)
def test_a_coefficient_for_each(kernels, coef_dtype):
    """Ragged and misaligned tensors of all dtypes, several chunks and launches.

    Where a coefficient is 1 or more, nothing is written; where it is -1, even NaN becomes +0.0.
    """
    tensors = [t for t in gradients(tuple(DTYPES), sizes=(1, 0, 63, 70000, 4097) * 10) if t.numel()]
    choices = torch.tensor([0.25, 1.0, -1.0, 0.123456789, 3.0, 0.0, math.nan], dtype=coef_dtype)
    coefs = choices.repeat(6)[: len(tensors)].contiguous()
    for tensor in tensors:
        tensor[-1] = math.nan
        tensor[0] = -1.5
    before = [t.clone() for t in tensors]
    scale_(kernels, tensors, coefs)
    for tensor, old, coef in zip(tensors, before, coefs):
        if coef >= 1.0:
            expected = old
        elif coef < 0.0:
            expected = torch.zeros_like(old)
            assert not tensor.signbit().any()
        else:
            expected = torch._foreach_mul([old], coef)[0]
        assert torch.equal(tensor.isnan(), expected.isnan())
        assert torch.equal(tensor.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtypes", [(d,) for d in DTYPES] + [tuple(DTYPES)], ids=str)
def test_zeroing_all(kernels, dtypes):
    tensors = gradients(dtypes)
    tensors[3][7], tensors[4][:2] = math.nan, math.inf
    scale_(kernels, tensors, torch.tensor(-1.0))
    assert not any(t.any() or t.signbit().any() for t in tensors)


@pytest.mark.parametrize("zero_if_nonfinite", [False, True])
@pytest.mark.parametrize("is_float64", [False, True])
@pytest.mark.parametrize("limit_dtype", [None, torch.float32, torch.float64], ids=str)
def test_the_rule_is_that_of_norms_py(kernels, limit_dtype, is_float64, zero_if_nonfinite):
    dtype = torch.float64 if is_float64 else torch.float32
    for value in (3.0, 0.0, math.nan, math.inf):
        tensors = [torch.tensor([value, 4.0], dtype=dtype), torch.randn(70000, dtype=dtype)]
        for limit in (0.0, 0.7, 1e9, 1e300, math.inf, -2.0, math.nan):
            if limit_dtype is None and not limit >= 0.0:
                continue
            given = limit if limit_dtype is None else torch.tensor(limit, dtype=limit_dtype)
            total, coef = norm(kernels, tensors, max_norm=given, zero_if_nonfinite=zero_if_nonfinite)
            rule = Rule(given, zero_if_nonfinite=zero_if_nonfinite)
            expected = float(rule.clip_coef(torch.tensor(total, dtype=dtype)))
            assert coef == expected or (math.isnan(coef) and math.isnan(expected)), (value, limit)


# ---------------------------------------------------------------- results for each tensor

# One chunk and many, empty tensors, tensors of a tile and of less; more than the 16 that a launch holds.
RAGGED = (1, 0, 63, 70000, 4097, 16384, 0, 33000, 300000, *[7, 20000] * 9)


def with_specials(tensors):
    """Spoil some tensors with zeros of both signs, NaN and infinities."""
    for index, tensor in enumerate(t for t in tensors if t.numel() > 3):
        tensor[:2] = torch.tensor([0.0, -0.0])
        if index % 3:
            tensor[[2, -1]] = (math.nan, math.inf, -math.inf)[index % 4 % 3]
    return tensors


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 3.0])
@pytest.mark.parametrize("dtypes", [(d,) for d in DTYPES] + [HALVES, tuple(DTYPES)], ids=str)
def test_norms_have_the_bits_of_each_tensor_alone(kernels, dtypes, p):
    tensors = gradients(dtypes, sizes=RAGGED)
    norms, coefs, total, rows = each(kernels, tensors, p, max_norm=0.5)
    with_elements = [t for t in tensors if t.numel()]
    if len(dtypes) < len(DTYPES):
        alone = [norm(kernels, [t], p, max_norm=0.5) for t in with_elements]
        assert [*zip(norms.tolist(), coefs.tolist())] == alone
        assert float(total.to(norms.dtype)) == norm(kernels, tensors, p)[0]
    else:  # one float64 tensor takes all to float64 arithmetic
        expected = [reference.total_norm([t], p) for t in with_elements]
        torch.testing.assert_close(norms, torch.tensor(expected).double(), rtol=NORM_TOLERANCE, atol=0.0)
    assert torch.equal(rows[0].to(norms.dtype), norms)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 3.0])
@pytest.mark.parametrize("dtypes", [(d,) for d in DTYPES] + [HALVES, tuple(DTYPES)], ids=str)
def test_statistics(kernels, dtypes, p):
    tensors = with_specials(gradients(dtypes, sizes=RAGGED))
    _, _, total, rows = each(kernels, tensors, p)
    exact = reference.statistics([t for t in tensors if t.numel()], p)
    for index, expected in enumerate(exact):
        norm, largest, zeros, nonfinite = rows[:, index].tolist()
        assert norm == pytest.approx(float(expected.norm), rel=NORM_TOLERANCE, nan_ok=True)
        assert largest == float(expected.absmax) or (math.isnan(largest) and math.isnan(expected.absmax))
        assert (zeros, nonfinite) == (expected.zeros, expected.nonfinite)
    assert total.isnan()


@pytest.mark.parametrize("p", [2.0, 1.0, 3.0])
def test_results_for_each_do_not_depend_on_the_grid(kernels, p):
    tensors = gradients(HALVES, sizes=RAGGED)
    first = each(kernels, tensors, p, blocks=1)
    for blocks, first_block in ((4, 2), (7, 6)):
        for one, other in zip(first, each(kernels, tensors, p, blocks=blocks, first_block=first_block)):
            assert torch.equal(one, other)


@pytest.mark.parametrize("size", [1e30, 1e-25, 1e-42])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_tensors_that_leave_the_range_of_float32(kernels, p, size):
    tensors = [torch.rand(5000) * size, torch.zeros(3000), torch.rand(70000), torch.rand(70000) * size]
    norms, _, _, rows = each(kernels, tensors, p)
    for index, tensor in enumerate(tensors):
        expected = reference.total_norm([tensor], p)
        assert norms[index].item() == pytest.approx(expected, rel=1e-6, abs=1.5e-45)
        assert rows[0, index].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("zero_if_nonfinite", [False, True])
@pytest.mark.parametrize("limit_dtype", [torch.float32, torch.float64], ids=str)
def test_a_limit_for_each(kernels, limit_dtype, zero_if_nonfinite):
    tensors = with_specials(gradients(HALVES, sizes=RAGGED))
    count = sum(t.numel() > 0 for t in tensors)
    limits = torch.tensor([0.5, 1e9, -1.0, math.nan, math.inf, 0.0, 1e300], dtype=limit_dtype).repeat(4)
    limits = limits[:count].contiguous()
    norms, coefs, _, _ = each(kernels, tensors, max_norm=limits, zero_if_nonfinite=zero_if_nonfinite)
    expected = Rule(limits, zero_if_nonfinite=zero_if_nonfinite).clip_coef(norms)
    assert torch.equal(coefs.nan_to_num(-7.0), expected.nan_to_num(-7.0))


@pytest.mark.parametrize("dtypes", [(d,) for d in DTYPES] + [tuple(DTYPES)], ids=str)
@pytest.mark.parametrize("bounds", [(-0.3, 0.7), (-math.inf, 0.1), (0.0, math.inf), (-100.0, 100.0)])
def test_clamp(kernels, dtypes, bounds):
    tensors = gradients(dtypes)
    tensors[3][7] = math.nan
    tensors[4][:2] = torch.tensor([math.inf, -math.inf])
    expected = [t.clamp(*bounds) for t in tensors]
    clamp_(kernels, tensors, *bounds)
    for ours, wanted in zip(tensors, expected):
        assert torch.equal(ours.isnan(), wanted.isnan())
        assert torch.equal(ours.nan_to_num(), wanted.nan_to_num())
