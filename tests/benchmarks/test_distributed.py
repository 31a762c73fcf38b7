"""python -m benchmarks.distributed: real ranks, what is counted and what is said about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks import distributed, distributed_results, plot, report
from benchmarks.contenders import BASELINE
from benchmarks.distributed_results import OURS, ShardedRecord

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no torch.distributed")
SMALL = ShardedRecord(
    ranks=1, mesh=[1], case="8x8", tensors=300, dtype="float32", state="unclipped", impl=OURS,
    first_ms=2.0, p50_ms=0.5, gone_ms=0.6, speedup_vs_torch=9.0, collectives=0, collective_bytes=0,
    norm_error=2e-8,
)  # fmt: skip
MACHINE = {"cpu": "A CPU", "cores": 2, "torch": "2.13.0", "commit": "0123abcd"}


def test_two_ranks_measure_and_send_one_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu-distributed.jsonl"
    arguments = ["--ranks", "2", "--counts", "3", "--models", "--seconds", "0.05", "--json", str(path)]
    assert distributed.main(arguments) == 0
    block, records = distributed_results.load(path)
    assert block["cpu"] and str(path) in capsys.readouterr().out
    assert distributed_results.is_sharded(path)
    assert [(r.mesh, r.impl) for r in records] == [(m, i) for m in ([2], [1, 2]) for i in (BASELINE, OURS)]
    for r in records:
        assert r.norm_error is not None and r.norm_error < 1e-6
        assert r.p50_ms is not None and r.first_ms is not None and r.gone_ms is not None
    assert {(r.collectives, r.collective_bytes) for r in records if r.impl == OURS} == {(1, 8)}
    assert not path.with_suffix(".png").exists()  # the figure shows runs on one rank


def test_the_figure_shows_runs_on_one_rank(tmp_path: Path) -> None:
    path = tmp_path / "a-distributed.png"
    assert distributed_results.draw(MACHINE, [SMALL], path) == path.exists() == plot.available()


def test_a_wrong_norm_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(SMALL, norm_error=float("nan"))

    def measures(worker: object, args: tuple[object, int, str], nprocs: int) -> None:
        distributed_results.save(Path(args[2], "records.jsonl"), {}, [wrong])

    monkeypatch.setattr(distributed, "spawn", measures)
    assert distributed.main(["--ranks", "1", "--json", str(tmp_path / "a-distributed.jsonl")]) == 1


def test_readme_shows_small_tensors_and_models() -> None:
    theirs = replace(SMALL, impl=BASELINE, first_ms=800.0, p50_ms=4.5, speedup_vs_torch=None, norm_error=1e-7)
    model = {"ranks": 2, "mesh": [2], "case": "gpt2-124m", "tensors": 148}
    unmeasured = replace(SMALL, tensors=2000, speedup_vs_torch=None)
    records = [
        theirs, SMALL, replace(SMALL, mesh=[1, 1]), unmeasured,
        replace(theirs, **model, p50_ms=30.0), replace(SMALL, **model, p50_ms=15.0, speedup_vs_torch=2.0),
    ]  # fmt: skip
    assert list(distributed_results.table(MACHINE, records)) == [
        "| A CPU, 2 cores, torch 2.13.0, gloo, commit 0123abcd | `torch.nn.utils` | `gradclip_ext` |",
        "|---|---|---|",
        "| 300 small DTensors on one rank, a new set of gradients | 800 ms | 2 ms |",
        "| 300 small DTensors on one rank, the same set again | 4.5 ms | 0.5 ms, **9x** |",
        "| 2,000 small DTensors on one rank, a new set of gradients | not measured | 2 ms |",
        "| 2,000 small DTensors on one rank, the same set again | not measured | 0.5 ms |",
        "| GPT-2 (124M) in float32, sharded over two ranks, nothing to clip | 30 ms | 15 ms, **2x** |",
        "| largest relative error of these norms | 1e-07 | **2e-08** |",
    ]


def test_every_row_is_printed_also_of_what_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a-distributed.jsonl"
    unmeasured = replace(SMALL, first_ms=None, problem="it would take 99 s")
    distributed_results.save(path, MACHINE, [SMALL, unmeasured])
    assert report.main([str(path)]) == 0
    header, row, other = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["ranks,", "mesh"]
    assert "2 ms" in row and "9.00x" in row
    assert " - " in other and other.endswith("it would take 99 s")


def test_files_of_sharded_gradients_are_not_taken_for_results(tmp_path: Path) -> None:
    distributed_results.save(tmp_path / distributed_results.file_name("a"), MACHINE, [SMALL])
    assert report.load(tmp_path) == {}
