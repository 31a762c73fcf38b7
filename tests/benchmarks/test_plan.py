"""The command line explains itself, and names what does not exist here."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_case import CPU

from benchmarks import __main__ as program
from benchmarks import machine, plan
from benchmarks.results import Record, Results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "gpt5"], "unknown case gpt5; there are: gpt2-124m, resnet-50"),
        (["--dtypes", "float8"], "unknown dtype float8; there are: float32"),
        (["--ops", "clip"], "unknown operation clip; there are: clip_grad_norm_:unclipped"),
        (["--impls", "fast"], "unknown implementation fast; there are: torch.nn.utils"),
        (["--impls", "transformer_engine"], "cannot be measured here: its kernels need a GPU"),
        (["--check", "missing.json"], "missing.json cannot be read: No such file"),
        (["--device", "tpu"], "there is no device 'tpu'"),
        (["--device", "mps"], "only cpu and cuda"),
        (["--json", "/proc/no/such/place.json"], "cannot be written"),
        (["--json", "/"], "cannot be written: it is a folder"),
    ],
)
def test_what_does_not_exist_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["--device", "cuda"]) == 2
    assert "no GPU was found" in capsys.readouterr().err


def test_too_little_memory_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: 10**9)
    path = tmp_path / "results.jsonl"
    chosen = ["--device", "cpu", "--cases", "gpt2-124m", "--dtypes", "float32", "--json", str(path)]
    assert program.main(chosen) == 1
    printed = capsys.readouterr()
    assert re.search(r"gpt2-124m in float32 is skipped: it needs 1\.\d GB, 1\.0 GB are free", printed.out)
    assert "Nothing was measured" in printed.err


RECORD = Record(
    case="2000x64", tensors=2000, numel=128_000, bytes=512_000, dtype="float32", device="cpu",
    op="clip_grad_norm_", state="unclipped", impl="gradclip_ext[foreach]", repeats=10, bound_us=1.0, ok=True,
    speedup_p20=9.0, speedup_vs_torch=10.0, speedup_p80=11.0,
)  # fmt: skip


def test_a_file_without_noise_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    Results(machine.describe(CPU), [replace(RECORD, speedup_p20=None)]).save(path)
    assert program.main(["--device", "cpu", "--check", str(path)]) == 2
    assert "it holds no noise to judge by" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan.parse(["--check", str(path), "--repeats", "9"])


def test_results_of_another_machine_are_not_resumed_or_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    Results({**machine.describe(CPU), "cpu": "Another"}).save(path)
    assert program.main(["--device", "cpu", "--check", str(path)]) == 2
    assert program.main(["--device", "cpu", "--json", str(path), "--resume"]) == 2
    assert capsys.readouterr().err.count("its cpu is 'Another', here it is") == 2


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--help"])
    printed = capsys.readouterr().out
    assert "python -m benchmarks --full" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_steps_are_measured_on_few_cases_unless_named() -> None:
    def cases(*arguments: str) -> set[str]:
        work = plan.plan(plan.parse(["--device", "cpu", "--dtypes", "float32", *arguments])).work
        return {case.name for (case, _), operations in work.items() if any(o.with_step for o in operations)}

    assert cases("--quick") == {"resnet-50", "2000x64"}
    assert cases("--cases", "1x1", "2000x64") == {"2000x64"}
    assert cases("--cases", "1x1", "--ops", "clip_grad_norm_+adamw") == {"1x1"}
    assert cases("--cases", "2000x64", "--ops", "clip_grad_norm_") == set()
