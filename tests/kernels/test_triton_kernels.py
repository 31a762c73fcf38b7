"""The Triton kernels on CPU tensors, in Triton's interpreter; test_triton_interpreted.py runs this file.

What every backend must do is in the shared suite, which runs there, too. Here is what only these
kernels can get wrong: tiles, chunks, programs and alignment. What they load and store is in
test_triton_accesses.py.
"""

from __future__ import annotations

import math
from array import array
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_inputs import (
    DTYPES,
    ORDERS,
    at_offset,
    backend,
    borders,
    chunk_numel,
    clones,
    interpreted,
    over_dtypes,
    over_orders,
    same,
)

import gradclip_ext
from gradclip_ext import reference
from gradclip_ext.backends import foreach_cpu
from gradclip_ext.backends.base import TensorList
from gradclip_ext.backends.triton import memory
from gradclip_ext.norms import REPORT, Rule

pytestmark = interpreted


def norm_of(tensors: list[Tensor], p: float = 2.0) -> Tensor:
    """Return the norm in float64, before it is rounded to what users get."""
    return backend.norm(TensorList(tensors), p, REPORT, torch.float64)[0]


def scale_(tensors: list[Tensor], clip_coef: Tensor) -> None:
    backend.scale_(TensorList(tensors), clip_coef)


def clamp_(tensors: list[Tensor], low: float, high: float) -> None:
    backend.clamp_(TensorList(tensors), low, high)


def assert_norm(tensors: list[Tensor], p: float) -> Tensor:
    norm = norm_of(tensors, p)
    assert norm.dtype == torch.float64 and norm.shape == ()
    exact = reference.total_norm(tensors, p)
    # p = 1 and 2 of what is not float64 are added in float32: 2.7e-7 at worst, see _sum. All else is
    # float64: a few roundings of power, sum and root, of which the root magnifies those before it.
    in_float64 = p not in (1.0, 2.0) or all(t.dtype == torch.float64 for t in tensors)
    budget = 8 * max(1.0, 1.0 / p) * torch.finfo(torch.float64).eps if in_float64 else 2.7e-7
    assert norm.item() == pytest.approx(exact, rel=budget), (norm, exact, p)
    return norm


# ---------------------------------------------------------------- values


@over_orders
@over_dtypes
def test_norm_at_the_borders_of_tiles_and_chunks(dtype: torch.dtype, p: float) -> None:
    assert_norm(borders(dtype), p)


@over_dtypes
def test_scale_touches_every_element_once(dtype: torch.dtype) -> None:
    """The product in float32, or wider, rounded once.

    The interpreter truncates a float32 to bfloat16 where compiled code rounds to nearest: it may
    be 1 ulp off, a relative 2^-7.
    """
    for coef in (torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.0)):
        grads = borders(dtype)
        before = clones(grads)
        scale_(grads, coef)
        for grad, old in zip(grads, before):
            expected = old * coef
            if dtype == torch.bfloat16:
                assert ((grad - expected).abs() <= 2.0**-7 * expected.abs()).all()
            else:
                assert same(grad, expected), (dtype, coef)


@over_orders
def test_norm_and_coefficient_of_one_kernel(p: float) -> None:
    """The bits of the separate steps: the norm rounded, and the coefficient in torch's operations."""
    for dtypes, scale in ((DTYPES[:3], 1.0), (DTYPES, 1.0), (DTYPES, 1e-3), (DTYPES[:3], math.inf)):
        tensors = [torch.randn(n).to(d) * scale for n, d in zip((20_000, 3, 700, 5), dtypes)]
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        expected = norm_of(tensors, p).to(dtype)
        for max_norm in (0.3, 1e4, 0.0):  # the second is not reached, and the coefficient is 1
            rule = Rule(max_norm)
            norm, coef = backend.norm(TensorList(tensors), p, rule, dtype)
            assert norm.dtype == coef.dtype == dtype and same(norm, expected)
            assert torch.equal(coef.nan_to_num(7.0), rule.clip_coef(norm).nan_to_num(7.0))


def test_a_coefficient_is_right_for_any_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gradients that overlap beside one listed twice: Triton takes the norm and foreach scales."""
    monkeypatch.setattr(foreach_cpu, "host_sees", lambda tensor: False)  # as on a GPU
    base, twice = torch.randn(100), torch.randn(5)
    grads = [base[:60], base[40:], twice, twice]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for param, grad in zip(params, grads):
        param.grad = grad
    before = clones(grads)
    gradclip_ext.clip_grad_norm_(params, 1e6, backend="triton")
    assert all(same(a, b) for a, b in zip(grads, before)), "nothing exceeds this threshold"


@over_dtypes
def test_clamp_touches_every_element(dtype: torch.dtype) -> None:
    for low, high in ((-0.1, 0.7), (-math.inf, 0.2), (0.05, 0.05), (0.1, math.inf)):
        grads = borders(dtype)
        grads[4][:3] = torch.tensor([math.nan, math.inf, -math.inf])
        before = clones(grads)
        clamp_(grads, low, high)
        for grad, old in zip(grads, before):
            assert same(grad, old.clamp(low, high)), (dtype, low, high)


@over_dtypes
def test_one_element_outside_among_nans_is_clamped(dtype: torch.dtype) -> None:
    """Which vectors change is told by their smallest and largest element."""
    vec = 16 // dtype.itemsize
    vectors = torch.full((2 * vec + 1, vec), math.nan, dtype=dtype)
    for i in range(vec):
        vectors[i, i], vectors[vec + i, i] = 3.0, -3.0
    grad = vectors.repeat(chunk_numel(dtype) // vectors.numel() + 1, 1).flatten()
    expected = grad.clamp(-1.0, 2.0)
    clamp_([grad], -1.0, 2.0)
    assert same(grad.nan_to_num(0.5), expected.nan_to_num(0.5)) and same(grad.isnan(), expected.isnan())


@over_dtypes
def test_bits_of_nan_survive_a_clamp(dtype: torch.dtype) -> None:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    # Quiet NaNs with a payload and of either sign.
    payload = torch.tensor([math.nan, math.nan, 5.0, 0.0], dtype=dtype).view(integer) + 1
    payload[1] |= torch.iinfo(integer).min
    grad = payload.repeat(chunk_numel(dtype) // 4 + 1).view(dtype)
    nan, before = grad.isnan(), grad.clone()
    clamp_([grad], -1.0, 1.0)
    assert same(grad[nan], before[nan]) and (grad[~nan] <= 1.0).all()


@pytest.mark.parametrize("p", [0.1, 7.3, 40.0, 300.0])
def test_any_order(p: float) -> None:
    """p reaches the kernel in float64."""
    assert_norm([torch.randn(3000, dtype=torch.float64), torch.randn(50, dtype=torch.float64)], p)
    assert_norm([torch.randn(3000), torch.randn(50)], p)


# ---------------------------------------------------------------- alignment, programs, lists


@over_dtypes
def test_same_bits_at_any_alignment(dtype: torch.dtype) -> None:
    values = torch.randn(chunk_numel(dtype) + chunk_numel(dtype) // 3).to(dtype)
    norms: dict[float, Tensor] = {}
    for offset in (0, 1, 3, 16 // dtype.itemsize):
        for p in (1.0, 2.0, 3.0, math.inf):
            norm = norm_of([at_offset(values, offset)], p)
            assert same(norms.setdefault(p, norm), norm), (offset, p)
        scaled, clamped = at_offset(values, offset), at_offset(values, offset)
        scale_([scaled], torch.tensor(0.25))  # exact in every dtype, by truncation, too
        clamp_([clamped], -0.5, 0.5)
        assert same(scaled, values * 0.25) and same(clamped, values.clamp(-0.5, 0.5)), offset


@over_dtypes
def test_ends_of_vectors_in_the_last_tile(dtype: torch.dtype) -> None:
    """Sizes that end in a vector or after it, in the first row of a tile, a later one or the next tile."""
    vec = 16 // dtype.itemsize
    row, tile = 128 * vec, 8 * 128 * vec  # of sums; a tile in place is half as long
    for vectors in (0, vec, row, 3 * row + vec, tile // 2, tile - vec, tile + 5 * row):
        for size in (vectors + 1, vectors + vec - 1, vectors + vec):
            values = torch.randn(size).to(dtype)
            values[-1] = 3.0  # what only the last element tells
            assert norm_of([values], math.inf) == values.abs().max()
            norm = assert_norm([at_offset(values, 0)], 2.0)
            for offset in (0, 1, vec - 1):
                assert same(norm_of([at_offset(values, offset)], 2.0), norm), (size, offset)
                # Beside the tensor is what must not change.
                buffer = at_offset(torch.full((size + 2 * vec,), 9.0, dtype=dtype), offset)
                grad = buffer[vec:-vec].copy_(values)
                scale_([grad], torch.tensor(0.25))
                assert same(grad, values * 0.25), (size, offset)
                clamp_([grad], -0.2, 0.3)
                assert same(grad, (values * 0.25).clamp(-0.2, 0.3)), (size, offset)
                assert (buffer[:vec] == 9.0).all() and (buffer[-vec:] == 9.0).all(), (size, offset)


def test_same_bits_for_any_number_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for programs in (1, 2, 5, 64):
        monkeypatch.setattr(memory, "_workspaces", {})
        monkeypatch.setattr(memory, "_INTERPRETED_PROGRAMS", programs)
        torch.manual_seed(1)
        grads = [*borders(torch.float32), *borders(torch.float16)[:5]]
        norms = [norm_of(grads, p) for p in (1.0, 2.0, 3.0, math.inf)]
        scale_(grads, torch.tensor(0.3))
        clamp_(grads, -0.2, 0.2)
        results.append([*norms, *grads])
    for result in results[1:]:
        assert all(same(a, b) for a, b in zip(result, results[0]))


@pytest.mark.parametrize("where", [0, 2, 4])
def test_empty_tensors_anywhere(where: int) -> None:
    grads = [torch.randn(5), torch.randn(3, 7), torch.randn(2000), torch.randn(1)]
    expected = [t * 0.5 for t in grads]
    grads.insert(where, torch.empty(0, 3))
    expected.insert(where, torch.empty(0, 3))
    for p in (2.0, math.inf):
        assert_norm(grads, p)
    scale_(grads, torch.tensor(0.5))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))
    clamp_(grads, -0.1, 0.1)
    assert all(torch.equal(a, b.clamp(-0.1, 0.1)) for a, b in zip(grads, expected))
    scale_([torch.empty(0)], torch.tensor(0.5))


def test_a_thousand_tiny_tensors() -> None:
    grads = [torch.randn(1 + i % 7).to(DTYPES[i % 11 % 4]) for i in range(1000)]
    assert_norm(grads, 2.0)
    expected = [t * 0.5 for t in grads]
    scale_(grads, torch.tensor(0.5))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected))


def test_a_list_that_changes_between_calls() -> None:
    """Sizes, dtypes and strides change under the same pointers; tables must follow."""
    base = torch.randn(4096)
    for view in (
        base,
        base[:100],
        base[:100].view(torch.float16),
        base[:50].view(torch.bfloat16),
        base[:100].view(10, 10).t(),
        base[:100],
    ):
        tensors = [view, torch.ones(3)]
        exact = reference.total_norm(tensors)
        assert norm_of(tensors, 2.0).item() == pytest.approx(exact, rel=1e-6, nan_ok=True)


def test_irregular_tensors_go_their_own_way() -> None:
    grads = [
        torch.randn(500),
        torch.randn(40, 3)[:, 1],
        torch.randn(7, dtype=torch.complex64),
        torch.randn(6, 5).t(),
    ]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for param, grad in zip(params, grads):
        param.grad = grad
    for p in ORDERS:
        norm = gradclip_ext.get_total_norm(grads, p, backend="triton")
        assert norm.item() == pytest.approx(reference.total_norm(grads, p), rel=1e-6)
    coef = (torch.tensor(2.0) + 1e-6).reciprocal()
    expected = [t * coef for t in grads]
    gradclip_ext.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0), backend="triton")
    for grad, wanted in zip(grads, expected):
        torch.testing.assert_close(grad, wanted)
    huge = [torch.randn(50) * 1e30, torch.randn(9, 2)[:, 0] * 1e30]
    for p in (3.0, 40.0):  # a sum of powers of the two norms would overflow
        norm = gradclip_ext.get_total_norm(huge, p, backend="triton")
        assert norm.item() == pytest.approx(reference.total_norm(huge, p), rel=1e-6)


def test_offsets_are_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk of a tensor of 4 GiB, of which memory has the touched pages only.

    Its table counts the chunks from the last one on, and an empty tensor precedes it.
    """
    numel, last = 2**31 + 40, 2**31 // chunk_numel(torch.float16)
    x = torch.empty(numel, dtype=torch.float16)
    x[-40:] = values = torch.randn(40).half()

    def table(columns: bytes) -> Any:
        made = genuine(columns)
        assert made.rows.tolist() == [x.data_ptr(), numel, 0, 0, 0, last + 1, 0]
        made.rows = array("q", [0, 0, last, x.data_ptr(), numel, 0, 0, 0, last + 1])
        made.groups = [memory.Group(torch.float16, 0, 2, 1)]
        return made

    genuine = memory.Table
    monkeypatch.setattr(memory, "Table", table)
    monkeypatch.setattr(memory, "_workspaces", {})
    scale_([x], torch.tensor(0.5))
    assert torch.equal(x[-40:], values * 0.5)
    clamp_([x], -0.1, 0.1)
    assert torch.equal(x[-40:], (values * 0.5).clamp(-0.1, 0.1))


# ---------------------------------------------------------------- NaN, infinity, the range


@over_dtypes
def test_nan_and_infinity_anywhere(dtype: torch.dtype) -> None:
    chunk = chunk_numel(dtype)
    for position in (0, 17, chunk // 4, chunk - 1, chunk + 1):
        for p in (1.0, 2.0, 3.0, math.inf):
            grad = torch.randn(chunk + 2).to(dtype)
            grad[position] = -math.inf
            assert norm_of([torch.ones(3), grad], p) == math.inf
            grad[position - 1] = -math.nan
            assert norm_of([grad, torch.ones(3)], p).isnan()


@over_orders
@pytest.mark.parametrize(
    "dtype, scales", [(torch.float32, (1e-38, 1e-25, 1e18, 1e37)), (torch.float64, (1e-300, 1e300))]
)
def test_range(dtype: torch.dtype, scales: tuple, p: float) -> None:
    """Chunks that overflow, that vanish, that are zero and that are ordinary, in one list."""
    for scale in scales:
        x = torch.randn(chunk_numel(dtype) + 50, dtype=dtype) * scale
        norm = assert_norm([x, torch.zeros(chunk_numel(dtype), dtype=dtype)], p)
        assert 0.0 < norm < math.inf
        assert_norm([x, torch.randn(20, dtype=dtype), x[:9]], p)


@over_orders
def test_zeros_alone(p: float) -> None:
    assert norm_of([torch.zeros(20_000), torch.zeros(3).bfloat16()], p).item() == 0.0


def test_partial_overlap_is_scaled_in_list_order() -> None:
    base = torch.randn(100)
    expected, coef = base.clone(), (torch.tensor(2.0) + 1e-6).reciprocal()
    for view in (expected[:60], expected[40:]):
        view.mul_(coef)
    params = [torch.nn.Parameter(torch.zeros(60)) for _ in range(2)]
    params[0].grad, params[1].grad = base[:60], base[40:]
    gradclip_ext.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0), backend="triton")
    assert torch.equal(base, expected)
