"""python -m benchmarks: what it prints and writes, resumed, interrupted and compared."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_case import CPU
from torch import Tensor

import gradclip_ext
from benchmarks import __main__ as program
from benchmarks import contenders, measure, plot, terminal
from benchmarks.cases import Case, Workload
from benchmarks.contenders import BASELINE, Implementation, available
from benchmarks.results import Record, Results

RECORD_FIELDS = [
    "case",
    "tensors",
    "numel",
    "bytes",
    "dtype",
    "device",
    "op",
    "state",
    "impl",
    "repeats",
    "p20_us",
    "p50_us",
    "p80_us",
    "host_us",
    "launches",
    "scratch_bytes",
    "gbps",
    "bound_us",
    "pct_of_bound",
    "speedup_vs_torch",
    "speedup_p20",
    "speedup_p80",
    "max_rel_error",
    "ok",
    "problem",
]


MACHINE_FIELDS = [
    "cpu",
    "cores",
    "gpu",
    "driver",
    "cuda",
    "torch",
    "triton",
    "gradclip_ext",
    "commit",
    "date",
    "read_gbps",
    "inplace_gbps",
    "peers",
]


def test_results_file_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    chosen = ["--device", "cpu", "--cases", "2000x64", "--dtypes", "float32", "--repeats", "3"]
    assert program.main([*chosen, "--ops", "clip_grad_norm_", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    rows = (terminal.HEADER + printed.partition(terminal.HEADER)[2].partition("memory ")[0]).splitlines()
    assert max(map(len, rows)) <= 100
    assert "1.00x" in printed
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [next(iter(line)) for line in lines] == ["kind"] * len(lines)
    kinds = [line.pop("kind") for line in lines]
    results = {kind: [line for k, line in zip(kinds, lines) if k == kind] for kind in kinds}
    assert list(results) == ["machine", "record", "host"]
    (block,) = results["machine"]
    assert list(block) == MACHINE_FIELDS
    assert len(results["record"]) == 2 * len(available(CPU)[0]) - 2
    assert {h["tensors"] for h in results["host"]} == set(measure.HOST_COUNTS)
    for suffix in ("", "-bandwidth", "-host"):
        assert (tmp_path / f"results{suffix}.png").exists() == plot.available()
    for record in results["record"]:
        assert list(record) == RECORD_FIELDS
        assert record["ok"]
        assert record["repeats"] == 3
        assert record["p20_us"] <= record["p50_us"] <= record["p80_us"]
        assert record["speedup_p20"] <= record["speedup_vs_torch"] <= record["speedup_p80"]
        assert record["bytes"] == 4 * record["numel"] == 512_000
        share = 100 * record["bound_us"] / record["p50_us"]
        assert record["pct_of_bound"] == pytest.approx(share, rel=0.01, abs=0.01)  # it has two decimals
    assert block["read_gbps"] > 0 and block["inplace_gbps"] > 0
    assert str(tmp_path) not in text
    assert str(Path(__file__).parents[2]) not in text
    assert socket.gethostname() not in text


def test_interrupt_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    measure_case = measure.measure_case

    def interrupted(*arguments: Any) -> Iterator[list[Record]]:
        yield next(measure_case(*arguments))
        raise KeyboardInterrupt

    path = tmp_path / "results.jsonl"
    chosen = ["--device", "cpu", "--cases", "2000x64", "--dtypes", "float32", "--repeats", "1"]
    chosen += ["--impls", "foreach", "--ops", "get_total_norm", "clip_grad_value_", "--json", str(path)]
    with monkeypatch.context() as patch:
        patch.setattr(measure, "measure_case", interrupted)
        assert program.main(chosen) == 130
    assert "Interrupted: the 2 rows measured so far are kept" in capsys.readouterr().out
    first = Results.load(path)
    assert [r.impl for r in first.records] == [BASELINE, "gradclip_ext[foreach]"]

    monkeypatch.setattr(measure, "host_times", None)  # what the file has is not measured again
    assert program.main([*chosen, "--resume"]) == 0
    resumed = Results.load(path)
    assert len(resumed.records) == 6
    assert [r.p50_us for r in resumed.records[:2]] == [r.p50_us for r in first.records]
    assert resumed.host == first.host


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
