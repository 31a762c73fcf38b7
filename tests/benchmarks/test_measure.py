"""Speed-ups are those of pairs, and what is wrong gets none."""

from __future__ import annotations

import pytest
import torch
from small_case import CPU, SETTINGS, SMALL, measured
from torch import Tensor

import gradclip_ext
from benchmarks import machine, measure, terminal
from benchmarks.cases import Workload
from benchmarks.contenders import BASELINE, Implementation, available
from benchmarks.machine import Clock
from benchmarks.measure import Timing, percentile
from benchmarks.operations import OPERATIONS


def test_a_wrong_torch_is_timed_but_gets_no_speedup() -> None:
    (operation,) = (o for o in OPERATIONS if o.name == "get_total_norm")
    wrong = Implementation(BASELINE, {"get_total_norm": lambda tensors: torch.tensor(1.0)})
    ours = available(CPU)[0]["gradclip_ext[foreach]"]
    ((first, second),) = measure.measure_case(SMALL, "float32", [operation], [wrong, ours], SETTINGS)
    assert not first.ok
    assert first.p50_us
    assert first.speedup_vs_torch is None
    assert second.ok
    assert second.speedup_vs_torch


def test_speedups_are_those_of_pairs() -> None:
    slow = Timing([10.0, 30.0, 90.0])
    fast = Timing([5.0, 10.0, 90.0])
    assert fast.ratios_to(slow) == [2.0, 3.0, 1.0]
    assert percentile(fast.ratios_to(slow), 50) == 2.0
    assert percentile(slow.us, 20) == pytest.approx(18.0)


def _norm_too_large(parameters: list[Tensor], max_norm: float) -> Tensor:
    return gradclip_ext.clip_grad_norm_(parameters, max_norm) * 1.001


def test_host_time_of_a_wrong_implementation_is_not_shown() -> None:
    wrong = Implementation("gradclip_ext[wrong]", {"clip_grad_norm_": _norm_too_large})
    right = available(CPU)[0]
    found = [h for times in measure.host_times([wrong, *right.values()], CPU, 1) for h in times]
    assert {h.impl for h in found} == set(right)
    assert max(map(len, terminal.host_rows(found))) <= 100


def test_a_step_is_timed_together_with_the_clipping() -> None:
    steps = tuple(o for o in OPERATIONS if o.with_step)
    for records, state in zip(measured("float32", None, steps), ("unclipped", "clipped")):
        assert {(r.op, r.state) for r in records} == {("clip_grad_norm_+adamw", state)}
        assert all(r.ok and r.speedup_vs_torch and r.repeats == 3 for r in records)


def test_on_a_gpu_the_host_time_is_measured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device clock needs the host time. Tested with a fake GPU and fake clocks."""
    workload = Workload(SMALL, "float32", CPU, cache_bytes=1)
    workload.device = torch.device("cuda")
    known = []

    def device_clock(device: torch.device, host_us: float = 100.0) -> Clock:
        known.append(host_us)
        return lambda call: (call(), 3.0)[1]

    monkeypatch.setattr(machine, "host_us", lambda call: (call(), 7.0)[1])
    monkeypatch.setattr(machine, "device_clock", device_clock)
    monkeypatch.setattr(measure._Turns, "count", lambda self, index: (2, 64))
    found = [available(CPU)[0][name] for name in (BASELINE, "gradclip_ext[foreach]")]
    for operation in OPERATIONS:
        timings = measure.time_operation(found, operation, workload, SETTINGS)
        assert timings == {i.name: Timing([3.0] * 3, 7.0, 2, 64) for i in found}
        assert known[-2:] == [7.0, 7.0]
