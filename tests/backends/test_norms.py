"""combine_norms: the norm of parts equals the norm of all elements, over the whole range."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradclip_ext import backends, norms, reference
from gradclip_ext.backends.base import TensorList

ORDERS = (0.5, 1.0, 1.5, 2.0, 3.0, 7.0, 40.0, math.inf, -0.5, -1.0, -2.0, -20.0, -math.inf)


def combined(values: list[float], norm_type: float, dtype: torch.dtype = torch.float64) -> float:
    result = norms.combine_norms([torch.tensor(v, dtype=dtype) for v in values], norm_type)
    assert result.shape == () and result.dtype == dtype
    return result.item()


@pytest.mark.parametrize("norm_type", ORDERS)
def test_the_norm_of_parts_is_the_norm_of_all(norm_type: float) -> None:
    for _ in range(20):
        parts = [random(1 + i * 3, dtype=torch.float64) for i in range(5)]
        found = combined([reference.total_norm([p], norm_type) for p in parts], norm_type)
        assert found == pytest.approx(reference.total_norm(parts, norm_type), rel=1e-12)


@pytest.mark.parametrize("norm_type", ORDERS)
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e-3, 1e3, 1e30, 1e300])
def test_nothing_leaves_the_range_before_the_result(norm_type: float, scale: float) -> None:
    values = random(4, dtype=torch.float64).abs()
    values = (values / values.max() * scale).tolist()
    expected = reference.total_norm([torch.tensor(values, dtype=torch.float64)], norm_type)
    assert combined(values, norm_type) == pytest.approx(expected, rel=1e-12)


def test_two_devices_with_a_high_order() -> None:
    for dtype in (torch.float32, torch.float64):
        assert combined([1e30, 1e30], 40.0, dtype) == pytest.approx(1e30 * 2 ** (1 / 40), rel=1e-6)
    assert combined([1e30, 1e30], 40.0) == pytest.approx(1.017e30, rel=1e-3)


@pytest.mark.parametrize("norm_type", ORDERS)
def test_one_part_is_kept_bit_for_bit(norm_type: float) -> None:
    for value in (0.0, 5e-324, 1.1e-3, 0.1, 1e300, math.inf):
        assert combined([value], norm_type) == value


@pytest.mark.parametrize("norm_type", ORDERS)
def test_nan_stays_nan(norm_type: float) -> None:
    for values in ([math.nan, 1.0], [1.0, math.nan], [math.nan, 0.0], [math.inf, math.nan], [math.nan]):
        assert math.isnan(combined(values, norm_type))


@pytest.mark.parametrize("norm_type", ORDERS)
def test_infinities_and_zeros(norm_type: float) -> None:
    """Positive orders: the largest decides. Negative orders: the smallest does."""
    positive = norm_type > 0
    assert combined([math.inf, 1.0], norm_type) == (math.inf if positive else pytest.approx(1.0))
    assert combined([0.0, 1.0], norm_type) == (pytest.approx(1.0) if positive else 0.0)
    assert combined([0.0, 0.0], norm_type) == 0.0
    assert combined([math.inf, math.inf], norm_type) == math.inf
    assert combined([0.0, math.inf], norm_type) == (math.inf if positive else 0.0)


def test_order_zero_counts() -> None:
    assert combined([3.0, 0.0, 2.0], 0.0) == 5.0
    assert math.isnan(combined([3.0, math.nan], 0.0))


def test_dtype_of_the_result() -> None:
    f32, f64, half, c64, c128 = (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
    )
    for dtypes, expected in (
        ({half}, f32),
        ({f32, half}, f32),
        ({c64, torch.complex32}, f32),
        ({f64, half}, f64),
        ({f32, c128}, f64),
        (set(), f32),
    ):
        assert norms.result_dtype(dtypes) is expected


def test_devices_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's GPUs and Intel's Arc; another Intel GPU has it."""
    assert norms.widest_dtype(torch.device("cpu")) is torch.float64
    assert norms.widest_dtype(torch.device("mps")) is torch.float32

    class Properties:
        has_fp64 = False

    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: Properties)
    assert norms.widest_dtype(torch.device("xpu")) is torch.float32
    Properties.has_fp64 = True
    assert norms.widest_dtype(torch.device("xpu")) is torch.float64


class Wide(TorchDispatchMode):
    """Notes which operations give float64 tensors on an Intel GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if any(t.device.type == "xpu" and t.dtype == torch.float64 for t in tensors):
            self.operations.append(str(func))
        return out


@pytest.mark.parametrize("has_float64", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf, 0.0, -1.0])
def test_no_float64_operation_where_the_device_has_none(
    monkeypatch: pytest.MonkeyPatch, norm_type: float, has_float64: bool
) -> None:
    """Intel's Arc raises on each of them. Its tensors are fakes here, and so is what torch knows of it."""
    properties = SimpleNamespace(has_fp64=has_float64)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    foreach, rule = backends.FOREACH, norms.Rule(1.0)

    def tensors(dtype: torch.dtype) -> TensorList:
        return TensorList([torch.empty(shape, device="xpu", dtype=dtype) for shape in ((3, 2), (4,))])

    with FakeTensorMode(), Wide() as seen:
        for dtype in (torch.float32, torch.bfloat16):
            foreach.norm(tensors(dtype), norm_type, rule, torch.float32)
            foreach.clip_each_(tensors(dtype), norm_type, rule, torch.float32)
            foreach.statistics(tensors(dtype), norm_type)
            foreach.scale_(tensors(dtype), torch.ones((), device="xpu"))
            foreach.clip_adaptive_(tensors(dtype), tensors(dtype), norms.AdaptiveRule(norm_type, 0.1, 1e-3))
    assert bool(seen.operations) == has_float64, seen.operations


def test_the_coefficient_of_a_half_norm_is_float32() -> None:
    coef = norms.Rule(0.5).clip_coef(torch.tensor(3.0, dtype=torch.bfloat16))
    assert isinstance(coef, Tensor) and coef.dtype == torch.float32
    assert coef.item() == pytest.approx(0.5 / 3, rel=1e-6)
    assert norms.REPORT.clip_coef(torch.tensor(math.nan)) == 1.0
