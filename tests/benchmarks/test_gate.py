"""The gate: every implementation here passes it, and no deliberate fault does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_case import measured
from torch import Tensor

import gradclip_ext
from benchmarks import terminal
from benchmarks.cases import DTYPES
from benchmarks.contenders import BASELINE, LOOP, Implementation
from benchmarks.operations import ADAPTIVE, OPERATIONS, PER_TENSOR, STATS

_NO_LOOP = (STATS, PER_TENSOR, ADAPTIVE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_available_passes_the_gate(dtype: str) -> None:
    for records in measured(dtype):
        for record in records:
            if record.problem == f"{record.impl} has no {record.op}":
                assert record.impl == LOOP and record.op in _NO_LOOP
                continue
            assert record.ok
            assert record.problem is None
            assert record.speedup_vs_torch is not None
            assert record.max_rel_error is not None
            assert record.impl.startswith(BASELINE) or record.max_rel_error <= 1e-6


def _drops_nan(parameters: list[Tensor], max_norm: float) -> Tensor:
    for p in parameters:
        p.grad.nan_to_num_(nan=0.0)
    return gradclip_ext.clip_grad_norm_(parameters, max_norm)


def _hides_nan(tensors: list[Tensor]) -> Tensor:
    return gradclip_ext.get_total_norm([t.nan_to_num(nan=0.0) for t in tensors])


def _stops_at_nan(parameters: list[Tensor], max_norm: float) -> Tensor:
    norm = gradclip_ext.get_total_norm([p.grad for p in parameters])
    return norm if norm.isnan() else gradclip_ext.clip_grad_norm_(parameters, max_norm)


def _scales_too_much(parameters: list[Tensor], max_norm: float) -> Tensor:
    norm = gradclip_ext.get_total_norm([p.grad for p in parameters])
    gradclip_ext.clip_grads_with_norm_(parameters, 1.001 * max_norm, norm)
    return norm


def _norm_too_large(tensors: list[Tensor]) -> Tensor:
    return gradclip_ext.get_total_norm(tensors) * 1.001


def _clamps_too_low(parameters: list[Tensor], clip_value: float) -> None:
    gradclip_ext.clip_grad_value_(parameters, clip_value / 1.01)  # 1.001 would be rounded away in bfloat16


def _stats(parameters: list[Tensor], **changed: Callable[[Tensor], Tensor]) -> SimpleNamespace:
    """Return right statistics but for what is changed."""
    stats = gradclip_ext.get_grad_stats(parameters)
    names = ("total_norm", "norms", "absmax", "zeros", "nonfinite")
    found = {name: getattr(stats, name) for name in names}
    return SimpleNamespace(**found | {name: change(found[name]) for name, change in changed.items()})


def _clips_by_the_joint_norm(parameters: list[Tensor], max_norm: float) -> Tensor:
    norms = torch.stack([gradclip_ext.get_total_norm([p.grad]) for p in parameters])
    gradclip_ext.clip_grad_norm_(parameters, max_norm)
    return norms


def _adaptive_by_the_whole_tensor(parameters: list[Tensor], clip_factor: float) -> None:
    for p in parameters:
        norm = gradclip_ext.get_total_norm([p.grad])
        p.grad.mul_(clip_factor * gradclip_ext.get_total_norm([p.detach()]) / norm)


def _raises(*_: Any) -> Tensor:
    raise RuntimeError("no kernel image")


def _without_last(function: Callable[..., Any], tensors: list[Tensor], *threshold: float) -> Any:
    return function(tensors[:-1], *threshold)


PLANTED = {
    "drops NaN": ("clip_grad_norm_", _drops_nan),
    "hides NaN": ("get_total_norm", _hides_nan),
    "stops at NaN": ("clip_grad_norm_", _stops_at_nan),
    "ignores the last gradient": ("clip_grad_norm_", partial(_without_last, gradclip_ext.clip_grad_norm_)),
    "ignores the last tensor": ("get_total_norm", partial(_without_last, gradclip_ext.get_total_norm)),
    "clamps all but the last": ("clip_grad_value_", partial(_without_last, gradclip_ext.clip_grad_value_)),
    "scales by 1.001": ("clip_grad_norm_", _scales_too_much),
    "norm 1.001 times too large": ("get_total_norm", _norm_too_large),
    "clamps too low": ("clip_grad_value_", _clamps_too_low),
    "a norm 1.001 times too large": (STATS, partial(_stats, norms=lambda norms: norms * 1.001)),
    "absmax an ulp too large": (STATS, partial(_stats, absmax=lambda x: x * (1 + 2**-23))),
    "a zero too many": (STATS, partial(_stats, zeros=lambda counts: counts + 1)),
    "counts no NaN": (STATS, partial(_stats, nonfinite=torch.zeros_like)),
    "clips by the joint norm": (PER_TENSOR, _clips_by_the_joint_norm),
    "ignores the units": (ADAPTIVE, _adaptive_by_the_whole_tensor),
    "raises": ("clip_grad_norm_", _raises),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", PLANTED)
def test_a_wrong_implementation_gets_no_speedup(fault: str, dtype: str) -> None:
    name, function = PLANTED[fault]
    wrong = Implementation("gradclip_ext[wrong]", {name: function})
    clipped = tuple(o for o in OPERATIONS if o.name == name)[-1]
    (records,) = measured(dtype, wrong, (clipped,))
    record = records[-1]
    assert (record.impl, record.ok) == ("gradclip_ext[wrong]", False)
    assert record.p50_us is record.speedup_vs_torch is record.gbps is record.pct_of_bound is None
    assert all(r.ok and r.speedup_vs_torch for r in records[:-1] if r.impl != LOOP or name not in _NO_LOOP)
    *_, row, reason = terminal.rows(records)
    assert "x " not in row
    assert f"NOT OK: {record.problem}" in reason
