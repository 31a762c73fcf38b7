"""python -m benchmarks.survival: what survives, what does not, and that the difference is noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import plot, survival
from benchmarks.contenders import BASELINE
from benchmarks.survival import OURS, Survival


def test_bad_steps_are_survived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu-survival.jsonl"
    status = survival.main(["--steps", "80", "--json", str(path)])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    found = Survival.load(path)
    without, theirs, ours = found.runs
    assert [run.name for run in found.runs] == [survival.NO_FAULTS, BASELINE, OURS]
    assert all(len(run.losses) == len(run.norms) == 80 for run in found.runs)
    assert without.final_loss is not None and ours.final_loss is not None and theirs.final_loss is None
    broken = {int(step) for step, factor in found.faults.items() if factor in ("nan", "inf")}
    assert not theirs.skipped and len(broken) == 2 and set(ours.skipped) >= broken
    assert found.sentences() in printed.out
    assert path.with_suffix(".png").exists() == plot.available()
    assert survival.is_survival(path)


def test_what_does_not_survive_is_noticed() -> None:
    without, _ = survival.train("without", survival.clip_as_torch, {}, 12, seed=0)
    broken, _ = survival.train("broken", survival.clip_as_torch, {6: float("nan")}, 12, seed=0)
    result = Survival({}, "small", 1, {"6": "nan"}, [without, broken, broken])
    skipped, final = survival.problems(result)
    assert skipped == "the loss is not finite in steps 6, which were not all skipped"
    assert final.startswith("the loss is NaN in the end, ")
    kept = replace(without, skipped=[6])
    assert survival.problems(replace(result, runs=[without, broken, kept])) == []
