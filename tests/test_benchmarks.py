"""python -m benchmarks: the gate bites, the files say what they must, the command line explains itself."""

from __future__ import annotations

import json
import math
import re
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gradclip_ext
from benchmarks import __main__ as program
from benchmarks import machine, measure, plot, report
from benchmarks.cases import (
    CASES,
    DTYPES,
    OPERATIONS,
    Case,
    Operation,
    Workload,
    dtypes_of,
    why_not_measurable,
)
from benchmarks.contenders import BASELINE, Implementation, available
from benchmarks.machine import Bandwidths
from benchmarks.measure import Settings, Timing, percentile
from benchmarks.results import Record, Results

CPU = torch.device("cpu")
SMALL = Case("small", "made up for the tests", ((300, 70), (128,), (7, 5)))
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


@pytest.fixture(autouse=True)
def small_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small work waits for other processes when it is shared among threads; large takes long."""
    monkeypatch.setattr(measure, "HOST_COUNTS", (1, 300))
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(machine, "_BANDWIDTH_REPEATS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(
    dtype: str, extra: Implementation | None = None, operations: tuple[Operation, ...] = OPERATIONS
) -> list[list[Record]]:
    settings = Settings(CPU, lambda: Bandwidths(10.0, 20.0), repeats=3, seconds=0.0)
    implementations = [*available(CPU)[0].values(), *([extra] if extra else [])]
    return list(measure.measure_case(SMALL, dtype, operations, implementations, settings))


# ---------------------------------------------------------------- the gate


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_available_passes_the_gate(dtype: str) -> None:
    for records in measured(dtype):
        for record in records:
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
    assert all(r.ok and r.speedup_vs_torch for r in records[:-1])
    *_, row, reason = report.rows(records)
    assert "x " not in row
    assert f"NOT OK: {record.problem}" in reason


def test_a_wrong_torch_is_timed_but_gets_no_speedup() -> None:
    (operation,) = (o for o in OPERATIONS if o.name == "get_total_norm")
    wrong = Implementation(BASELINE, {"get_total_norm": lambda tensors: torch.tensor(1.0)})
    ours = available(CPU)[0]["gradclip_ext[foreach]"]
    settings = Settings(CPU, lambda: Bandwidths(10.0, 20.0), repeats=3, seconds=0.0)
    ((first, second),) = measure.measure_case(SMALL, "float32", [operation], [wrong, ours], settings)
    assert not first.ok
    assert first.p50_us
    assert first.speedup_vs_torch is None
    assert second.ok
    assert second.speedup_vs_torch


def test_gradients_are_pristine_again_after_every_operation() -> None:
    workload = Workload(SMALL, "float32", CPU, cache_bytes=1 << 20)
    parameters = workload.next()
    gradclip_ext.clip_grad_norm_(parameters, 0.5 * workload.norm)
    workload.restore(parameters)
    assert all(torch.equal(p.grad, t) for p, t in zip(parameters, workload.pristine))
    assert workload.next()[0] is not parameters[0]
    exact = math.sqrt(sum(float(t.double().pow(2).sum()) for t in workload.pristine))
    assert workload.norm == pytest.approx(exact, rel=1e-12)


def test_speedups_are_those_of_pairs() -> None:
    slow = Timing([10.0, 30.0, 90.0])
    fast = Timing([5.0, 10.0, 90.0])
    assert fast.ratios_to(slow) == [2.0, 3.0, 1.0]
    assert percentile(fast.ratios_to(slow), 50) == 2.0
    assert percentile(slow.us, 20) == pytest.approx(18.0)


# ---------------------------------------------------------------- cases


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
        mixed = set(dtypes_of(case, "mixed"))
        assert (
            len(mixed) == 2
            or why_not_measurable(case, "mixed", 1, None) == "a single tensor has a single dtype"
        )


# ---------------------------------------------------------------- the command line


def test_results_file_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.jsonl"
    chosen = ["--device", "cpu", "--cases", "2000x64", "--dtypes", "float32", "--repeats", "3"]
    assert program.main([*chosen, "--ops", "clip_grad_norm_", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    rows = (report.HEADER + printed.partition(report.HEADER)[2].partition("memory ")[0]).splitlines()
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
    assert str(Path(__file__).parents[1]) not in text
    assert socket.gethostname() not in text


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


def test_the_bound_is_of_the_passes_that_nobody_can_do_without() -> None:
    bandwidths = Bandwidths(read_gbps=10.0, inplace_gbps=16.0)
    bounds = {o.label: o.bound_us(1_000_000, bandwidths) for o in OPERATIONS}
    assert bounds["clip_grad_norm_:unclipped"] == 100.0
    assert bounds["clip_grad_norm_:clipped"] == 100.0 + 125.0
    assert bounds["clip_grad_value_:clipped"] == 125.0


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


def test_a_killed_run_leaves_the_last_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    Results({"cpu": "first"}).save(path)
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Results({"cpu": "second"}).save(path)
    assert Results.load(path).machine == {"cpu": "first"}


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
