"""The cases have the published sizes, and the gradients are those that were drawn."""

from __future__ import annotations

import math

import pytest
import torch
from small_case import CPU, SMALL

import gradclip_ext
from benchmarks.cases import CASES, Case, Workload, dtypes_of, why_not_measurable
from benchmarks.machine import Bandwidths
from benchmarks.operations import OPERATIONS, STEP


@pytest.mark.parametrize(
    ("name", "tensors", "numel"),
    [
        ("gpt2-124m", 148, 124_439_808),
        ("resnet-50", 161, 25_557_032),
        ("vit-b-16", 152, 86_567_656),
        ("llama-3-8b", 291, 8_030_261_248),
        ("lora-llama-3-8b", 448, 41_943_040),
        ("2000x64", 2000, 128_000),
    ],
)
def test_cases_have_the_published_sizes(name: str, tensors: int, numel: int) -> None:
    assert (CASES[name].tensors, CASES[name].numel) == (tensors, numel)


def test_a_mixed_list_is_mixed() -> None:
    assert dtypes_of(SMALL, "mixed") == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert Workload(SMALL, "mixed", CPU, cache_bytes=1).bytes == 2 * 300 * 70 + 4 * 128 + 2 * 35
    alike = Case("alike", "made up for the tests", ((3,), (3,)))
    assert dtypes_of(alike, "mixed") == [torch.bfloat16, torch.float32]
    for case in CASES.values():
        reason = why_not_measurable(case, "mixed", OPERATIONS[0], 1, None)
        assert len(set(dtypes_of(case, "mixed"))) == 2 or reason == "a single tensor has a single dtype"


def test_gradients_are_restored_after_every_operation() -> None:
    workload = Workload(SMALL, "float32", CPU, cache_bytes=1 << 20)
    parameters = workload.next()
    gradclip_ext.clip_grad_norm_(parameters, 0.5 * workload.norm)
    workload.restore(parameters)
    assert all(torch.equal(p.grad, t) for p, t in zip(parameters, workload.original))
    assert workload.next()[0] is not parameters[0]
    exact = math.sqrt(sum(float(t.double().pow(2).sum()) for t in workload.original))
    assert workload.norm == pytest.approx(exact, rel=1e-12)


def test_the_bound_counts_only_passes_that_cannot_be_avoided() -> None:
    bandwidths = Bandwidths(read_gbps=10.0, inplace_gbps=16.0)
    bounds = {o.label: o.bound_us(1_000_000, bandwidths) for o in OPERATIONS}
    assert bounds["clip_grad_norm_:unclipped"] == 100.0
    assert bounds["clip_grad_norm_:clipped"] == 100.0 + 125.0
    assert bounds["clip_grad_value_:clipped"] == 125.0


def test_every_step_gets_new_gradients_and_updates_the_weights() -> None:
    workload = Workload(SMALL, "float32", CPU, cache_bytes=1)
    parameters, step = workload.train()
    first = [p.grad for p in parameters]
    weights = [p.detach().clone() for p in parameters]
    gradclip_ext.clip_grad_norm_(parameters, 0.5 * workload.norm)
    step()
    assert not any(torch.equal(p, w) for p, w in zip(parameters, weights))
    again, _ = workload.train()
    assert all(p is q for p, q in zip(again, parameters))
    assert not any(p.grad is g for p, g in zip(parameters, first))
    assert all(torch.equal(p.grad, t) for p, t in zip(parameters, workload.original))


def test_a_step_needs_more_memory() -> None:
    clip, step = (
        next(o for o in OPERATIONS if o.name == name)
        for name in ("clip_grad_norm_", f"clip_grad_norm_{STEP}")
    )
    assert why_not_measurable(SMALL, "float32", clip, 1, (512 << 20) + 300_000) is None
    reason = why_not_measurable(SMALL, "float32", step, 1, (512 << 20) + 300_000)
    assert reason is not None and reason.startswith("clip_grad_norm_+adamw needs")
