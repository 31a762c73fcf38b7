"""Properties that must hold for any input, tested with hypothesis; pytest's header has the seed."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import oracle
import torch
from cases import DTYPES, LAYOUTS, REAL_DTYPES, Target, clones, grads_of, seeded
from hypothesis import strategies as st
from oracle import parameter
from torch import Tensor

from gradclip_ext import reference

# The unit roundoff of a gradient that is rounded after the product with the coefficient.
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

SHAPES = st.one_of(
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
    st.integers(0, 3000).map(lambda n: (n,)),
    st.sampled_from([(511,), (512,), (513,), (1024,), (33, 65), (1,), ()]),
)
POSITIVE_ORDERS = st.one_of(st.sampled_from([0.5, 1.0, 2.0, 3.0, math.inf]), st.floats(0.3, 6.0))
ORDERS = st.one_of(POSITIVE_ORDERS, st.sampled_from([0.0, -math.inf, -1.0, -2.0]))


@st.composite
def gradients(draw: st.DrawFn, dtypes: tuple = REAL_DTYPES, widest: int = 10) -> list[Tensor]:
    """Draw a list of gradients, of one dtype or of several, each with a magnitude of its own."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kinds = draw(st.sampled_from([*[(d,) for d in dtypes], dtypes]))
    grads = []
    for shape in draw(st.lists(SHAPES, min_size=1, max_size=6)):
        dtype = draw(st.sampled_from(kinds))
        exponent = draw(st.integers(-widest, widest))
        real = torch.float64 if dtype == torch.complex64 else dtype
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0**exponent
        grads.append(torch.complex(values, -values).to(dtype) if dtype.is_complex else values.to(real))
    return grads


def placed(backend: Target, grads: list[Tensor]) -> list[Tensor]:
    return [parameter(g.to(backend.device, copy=True)) for g in grads]


def normal_part(grads: list[Tensor]) -> list[Tensor]:
    """Return the elements that are not subnormal, in float64; leaving elements out only lowers a norm."""
    kept = []
    for grad in grads:
        x = oracle.wide(grad)
        kept.append(x[x.abs() >= torch.finfo(grad.dtype).smallest_normal])
    return kept


@seeded
@hypothesis.given(grads=gradients(), norm_type=POSITIVE_ORDERS, max_norm=st.floats(1e-4, 1e4))
def test_the_limit_holds(backend: Target, grads: list[Tensor], norm_type: float, max_norm: float) -> None:
    """After clipping, the float64 norm is at most max_norm (1 + u + 1e-6)."""
    params = placed(backend, grads)
    backend.clip_grad_norm_(params, max_norm, norm_type)
    after = reference.total_norm(normal_part(grads_of(params)), norm_type)
    u = max(UNIT.get(g.dtype, 0.0) for g in grads)
    assert after <= max_norm * (1 + u + 1e-6), f"{after / max_norm - 1:.3e} above {max_norm}"


@seeded
@hypothesis.given(
    grads=gradients((torch.float32,), widest=60), norm_type=st.sampled_from([1.0, 2.0, 3.0, math.inf])
)
def test_the_limit_holds_over_the_range_of_float32(
    backend: Target, grads: list[Tensor], norm_type: float
) -> None:
    params = placed(backend, grads)
    backend.clip_grad_norm_(params, 1.0, norm_type)
    assert reference.total_norm(normal_part(grads_of(params)), norm_type) <= 1 + 1e-6


@seeded
@hypothesis.given(grads=gradients(DTYPES), norm_type=ORDERS, max_norm=st.floats(0, 1e4))
def test_norm_and_product_match_the_oracle(
    backend: Target, grads: list[Tensor], norm_type: float, max_norm: float
) -> None:
    params = placed(backend, grads)
    before = clones(grads_of(params))
    norm = backend.clip_grad_norm_(params, max_norm, norm_type)
    exact = torch.tensor(reference.total_norm(before, norm_type)).to(norm.dtype).item()
    assert norm.item() == exact or abs(norm.item() - exact) <= 1e-6 * exact
    oracle.assert_scaled(grads_of(params), before, norm, max_norm)


@seeded
@hypothesis.given(grads=gradients(), norm_type=ORDERS, max_norm=st.floats(0, 1e4))
def test_no_element_grows_or_changes_sign(
    backend: Target, grads: list[Tensor], norm_type: float, max_norm: float
) -> None:
    params = placed(backend, grads)
    backend.clip_grad_norm_(params, max_norm, norm_type)
    for after, before in zip(grads_of(params), grads):
        assert (after.cpu().abs() <= before.abs()).all()
        assert (after.cpu() * before >= 0).all()


@seeded
@hypothesis.given(grads=gradients(), norm_type=ORDERS, data=st.data())
def test_norm_does_not_depend_on_how_the_list_is_cut(
    backend: Target, grads: list[Tensor], norm_type: float, data: Any
) -> None:
    """Order 0 counts tensors, so it alone may. A bfloat16 norm that depended on grouping was a bug report."""
    hypothesis.assume(norm_type != 0.0)
    whole = backend.get_total_norm([g.to(backend.device) for g in grads], norm_type)
    pieces = [p for g in data.draw(st.permutations(grads)) for p in g.reshape(-1).tensor_split(3)]
    cut = backend.get_total_norm([p.to(backend.device) for p in pieces], norm_type)
    assert cut.item() == whole.item() or abs(cut / whole - 1) <= 1e-6


@seeded
@hypothesis.given(
    grads=gradients((torch.float32, torch.float64)), norm_type=ORDERS, exponent=st.integers(-20, 20)
)
def test_norm_is_homogeneous(backend: Target, grads: list[Tensor], norm_type: float, exponent: int) -> None:
    hypothesis.assume(norm_type != 0.0)
    one = backend.get_total_norm([g.to(backend.device) for g in grads], norm_type).item()
    other = backend.get_total_norm([g.to(backend.device) * 2.0**exponent for g in grads], norm_type).item()
    assert other == one * 2.0**exponent or abs(other / (one * 2.0**exponent) - 1) <= 1e-6


@seeded
@hypothesis.given(data=st.data(), dtype=st.sampled_from(DTYPES), norm_type=ORDERS)
def test_layout_does_not_matter(backend: Target, data: Any, dtype: torch.dtype, norm_type: float) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=1, max_size=5))
    grads = [LAYOUTS[name](dtype=dtype, device=backend.device) for name in names]
    outside = [oracle.gaps(g) for g in grads]
    dense = [parameter(g.clone(memory_format=torch.contiguous_format)) for g in grads]
    norm = backend.clip_grad_norm_([parameter(g) for g in grads], 0.5, norm_type)
    other = backend.clip_grad_norm_(dense, 0.5, norm_type)
    assert norm.item() == other.item() or abs(norm / other - 1) <= 1e-6
    for grad, twin, old in zip(grads, dense, outside):
        before = torch.finfo(dtype).eps
        error = (oracle.wide(grad) - oracle.wide(twin.grad)).abs()
        assert (error <= (before + 2e-6) * oracle.wide(twin.grad).abs() + 1e-7).all()
        oracle.assert_same_bits(oracle.gaps(grad), old)


def assert_clamped(backend: Target, params: list[Any], before: list[Tensor], low: float, high: float) -> None:
    by_torch_on_gpu = backend.name == "foreach" and backend.device != "cpu"
    for after, old in zip(grads_of(params), before):
        expected = old.clamp(low, high)
        oracle.assert_within_ulps(after.cpu(), expected, 0)
        # Between -0.0 and 0.0, a GPU's maximum and minimum may return either.
        bounds = torch.tensor([low, high]).to(old.dtype)
        if not (by_torch_on_gpu and (bounds == 0.0).any()):
            oracle.assert_same_bits(after.cpu(), expected)


@seeded
@hypothesis.given(grads=gradients(), bounds=st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)))
def test_clamp(backend: Target, grads: list[Tensor], bounds: tuple[float, float]) -> None:
    low, high = sorted(bounds)
    params = placed(backend, grads)
    backend.clamp_grad_(params, low, high)
    assert_clamped(backend, params, grads, low, high)
    with oracle.unchanged(grads_of(params)):  # a second time changes nothing
        backend.clamp_grad_(params, low, high)


@seeded
@hypothesis.given(grads=gradients(), clip_value=st.floats(0, 1e4))
def test_value(backend: Target, grads: list[Tensor], clip_value: float) -> None:
    params = placed(backend, grads)
    backend.clip_grad_value_(params, clip_value)
    assert_clamped(backend, params, grads, -clip_value, clip_value)
