"""python -m benchmarks --check, and the host times: one slow case is enough, and noise is not a case."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gradclip_ext
from benchmarks import __main__ as program
from benchmarks import contenders, machine, measure, plan, report, results
from benchmarks.cases import DTYPES, Case, Workload
from benchmarks.contenders import Implementation, available
from benchmarks.results import HostTime, Record, Results

CPU = torch.device("cpu")
RECORD = Record(
    case="2000x64", tensors=2000, numel=128_000, bytes=512_000, dtype="float32", device="cpu",
    op="clip_grad_norm_", state="unclipped", impl="gradclip_ext[foreach]", repeats=10, bound_us=1.0, ok=True,
    speedup_p20=9.0, speedup_vs_torch=10.0, speedup_p80=11.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand tensors, or enough copies to exceed a real cache, take seconds."""
    monkeypatch.setattr(measure, "HOST_COUNTS", (1, 300))
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(machine, "_BANDWIDTH_REPEATS", 1)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 0),
        ({"speedup_p20": 8.0, "speedup_vs_torch": 8.8, "speedup_p80": 9.1}, 0),  # the spreads overlap
        ({"speedup_p20": 7.0, "speedup_vs_torch": 7.5, "speedup_p80": 8.0}, 1),
        ({"ok": False, "problem": "the norm is off", "speedup_vs_torch": None, "speedup_p80": None}, 1),
        ({"impl": "torch.nn.utils[loop]", "speedup_p80": 1.0}, 0),  # others may be as slow as they like
        ({"case": "not in the file", "speedup_p80": 1.0}, 0),
    ],
)
def test_every_case_is_judged_by_its_own_noise(changes: dict[str, Any], count: int) -> None:
    fine = [replace(RECORD, dtype=dtype) for dtype in DTYPES[1:]]  # no help to the one that is not
    now, before = Results({}, [replace(RECORD, **changes), *fine]), Results({}, [RECORD, *fine])
    assert len(results.regressions(now.records, before)) == count


@pytest.mark.parametrize("lasting", [True, False], ids=["lasting", "passing"])
def test_a_planted_slowdown_fails_if_it_lasts(
    lasting: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tmp_path / "before.jsonl"
    chosen = ["--device", "cpu", "--cases", "2000x64", "--dtypes", "float32", "--impls", "foreach"]
    chosen += ["--ops", "get_total_norm", "--repeats", "10"]
    assert program.main([*chosen, "--json", str(before)]) == 0
    workloads: list[object] = []

    def slow(tensors: list[Tensor]) -> Tensor:
        for _ in range(9 if lasting or len(workloads) == 1 else 0):
            gradclip_ext.get_total_norm(tensors, backend="foreach")
        return gradclip_ext.get_total_norm(tensors, backend="foreach")

    def planted(device: torch.device) -> tuple[dict[str, Implementation], dict[str, str]]:
        found, missing = available(device)
        foreach = found["gradclip_ext[foreach]"]
        found[foreach.name] = replace(foreach, functions={**foreach.functions, "get_total_norm": slow})
        return found, missing

    def counted(case: Case, *arguments: Any, **options: Any) -> Workload:
        if case.name != "host":
            workloads.append(case)
        return Workload(case, *arguments, **options)

    monkeypatch.setattr(contenders, "available", planted)
    monkeypatch.setattr(measure, "Workload", counted)
    after = ["--json", str(tmp_path / "after.jsonl")]
    assert program.main([*chosen, *after, "--check", str(before)]) == int(lasting)
    printed = capsys.readouterr()
    line = "SLOWER OR WRONG: 2000x64 float32 get_total_norm:unclipped gradclip_ext[foreach]:"
    assert (line in printed.err) == lasting
    assert "1 rows look worse than before and are measured again" in printed.out
    assert f"1 rows compared, {int(lasting)} worse than their noise allows" in printed.out


def test_a_file_without_noise_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    Results(machine.describe(CPU), [replace(RECORD, speedup_p20=None)]).save(path)
    assert program.main(["--device", "cpu", "--check", str(path)]) == 2
    assert "it holds no noise to judge by" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan.parse(["--check", str(path), "--repeats", "9"])


def test_host_costs_come_from_both_ends() -> None:
    times = [HostTime("a", 300, 20.0), HostTime("a", 10_000, 1960.0), HostTime("b", 300, 5.0)]
    assert results.host_costs(times) == {"a": results.Cost(20.0, pytest.approx(0.2))}


def _norm_too_large(parameters: list[Tensor], max_norm: float) -> Tensor:
    return gradclip_ext.clip_grad_norm_(parameters, max_norm) * 1.001


def test_host_time_of_a_wrong_implementation_is_not_shown() -> None:
    wrong = Implementation("gradclip_ext[wrong]", {"clip_grad_norm_": _norm_too_large})
    right = available(CPU)[0]
    found = [h for times in measure.host_times([wrong, *right.values()], CPU, 1) for h in times]
    assert {h.impl for h in found} == set(right)
    assert max(map(len, report.host_rows(found))) <= 100
