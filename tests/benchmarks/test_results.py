"""The files: written whole or not at all, and compared record by record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results
from benchmarks.cases import DTYPES
from benchmarks.results import HostTime, Record, Results

RECORD = Record(
    case="2000x64", tensors=2000, numel=128_000, bytes=512_000, dtype="float32", device="cpu",
    op="clip_grad_norm_", state="unclipped", impl="gradclip_ext[foreach]", repeats=10, bound_us=1.0, ok=True,
    speedup_p20=9.0, speedup_vs_torch=10.0, speedup_p80=11.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 0),
        ({"speedup_p20": 8.0, "speedup_vs_torch": 8.8, "speedup_p80": 9.1}, 0),  # the spreads overlap
        ({"speedup_p20": 7.0, "speedup_vs_torch": 7.5, "speedup_p80": 8.0}, 1),
        ({"ok": False, "problem": "the norm is off", "speedup_vs_torch": None, "speedup_p80": None}, 1),
        ({"impl": "torch.nn.utils[loop]", "speedup_p80": 1.0}, 0),  # the speed of others is not checked
        ({"case": "not in the file", "speedup_p80": 1.0}, 0),
    ],
)
def test_every_case_is_judged_by_its_own_noise(changes: dict[str, Any], count: int) -> None:
    fine = [replace(RECORD, dtype=dtype) for dtype in DTYPES[1:]]  # they must not hide the one that is slower
    now, before = Results({}, [replace(RECORD, **changes), *fine]), Results({}, [RECORD, *fine])
    assert len(results.regressions(now.records, before)) == count


def test_host_costs_come_from_both_ends() -> None:
    times = [HostTime("a", 300, 20.0), HostTime("a", 10_000, 1960.0), HostTime("b", 300, 5.0)]
    assert results.host_costs(times) == {"a": results.Cost(20.0, pytest.approx(0.2))}


def test_a_killed_run_leaves_the_last_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    Results({"cpu": "first"}).save(path)
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Results({"cpu": "second"}).save(path)
    assert Results.load(path).machine == {"cpu": "first"}
