"""python -m benchmarks.report: README, tables and figures are those of the results files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import plot, report, second_pass
from benchmarks.operations import STATS
from benchmarks.results import HostTime, Record, Results, Skipped

REMEDY = "run python -m benchmarks.report"
RECORD = Record(
    case="gpt2-124m", tensors=148, numel=124_439_808, bytes=497_759_232, dtype="float32", device="cpu",
    op="clip_grad_norm_", state="unclipped", impl="gradclip_ext[cpu]", repeats=12, p50_us=14_000.0, gbps=35.6,
    bound_us=12_000.0, pct_of_bound=85.7, speedup_p20=2.5, speedup_vs_torch=2.72, speedup_p80=2.9, ok=True,
)  # fmt: skip
MACHINE = {
    "cpu": "A CPU", "cores": 2, "gpu": None, "torch": "2.13.0", "commit": "abc", "date": "2026-01-01",
    "read_gbps": 40.0, "inplace_gbps": 70.0, "peers": {"deepspeed": {"version": "0.18", "note": "slow"}},
}  # fmt: skip


@pytest.fixture
def results() -> Results:
    wrong = replace(RECORD, dtype="bfloat16", speedup_vs_torch=None, ok=False, problem="the norm is off")
    host = [HostTime(impl, n, us * n) for impl, us in (("torch.nn.utils", 3.0), ("gradclip_ext[cpu]", 0.05))
            for n in (300, 10_000)]  # fmt: skip
    return Results(MACHINE, [RECORD, wrong], host, [Skipped("llama-3-8b", "float32", "it needs 64.1 GB")])


def test_readme_is_made_from_the_results_files() -> None:
    text = report.README.read_text()
    assert report.replaced(text, report.readme_blocks(report.load())) == text, REMEDY


def test_index_is_made_from_the_results_files() -> None:
    text = (report.FOLDER / "README.md").read_text()
    assert text == report.index(report.load()), REMEDY
    assert len(text.splitlines()) <= 120 * len(report.load())


def test_every_row_of_a_file_is_printed(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    results.save(path)
    assert report.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"gradclip_ext\[cpu\] +14 ms .* 86 % +2.72x +2.50x-2.90x", printed)
    assert "NOT OK: the norm is off" in printed
    assert max(map(len, printed.splitlines())) <= 100
    assert report.main([str(tmp_path / "missing.jsonl")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_figures_are_made_from_the_results_files() -> None:
    texts = report.README.read_text() + (report.FOLDER / "README.md").read_text()
    for stem, results in report.load().items():
        # A training's are drawn by that run; those of sharded gradients and of faults have no fingerprint.
        for name in re.findall(rf"\b({re.escape(stem)}(?!-train|-distributed|-survival)[\w-]*\.png)", texts):
            picture = (report.FOLDER / name).read_bytes()
            assert f"results {plot.fingerprint(results)}".encode() in picture, f"{name}: {REMEDY}"


def test_every_number_about_speed_in_readme_comes_from_a_results_file() -> None:
    """Outside the blocks that are made from the files, README says nothing with a unit of speed."""
    text = report.replaced(report.README.read_text(), dict.fromkeys(report.readme_blocks({}), ""))
    claims = re.findall(r"\b[\d.,]+ ?(?:x\b|times\b|%|[GM]B/s|TB/s|[mµun]s\b|seconds?\b)", text)
    assert claims == []


def test_a_changed_file_is_noticed(results: Results) -> None:
    blocks = report.readme_blocks({"a": results})
    slower = replace(RECORD, speedup_vs_torch=2.71)
    changed = Results(MACHINE, [slower, *results.records[1:]], results.host, results.skipped)
    assert report.readme_blocks({"a": changed})["table"] != blocks["table"]
    faster_memory = Results({**MACHINE, "read_gbps": 41.0}, results.records)
    assert report.index({"a": faster_memory}) != report.index({"a": results})
    assert plot.fingerprint(changed) != plot.fingerprint(results)


def test_readme_has_four_numbers_of_the_first_file(results: Results) -> None:
    theirs = {"impl": "torch.nn.utils", "p50_us": 39e3, "speedup_vs_torch": 1.0, "max_rel_error": 2e-3}
    ours = {"p50_us": 13e3, "speedup_vs_torch": 3.1, "max_rel_error": 2e-8}
    records = [
        replace(RECORD, dtype=dtype, op=op, **measured)
        for dtype in ("float32", "bfloat16")
        for op in ("clip_grad_norm_", "get_total_norm")
        for measured in (theirs, ours)
    ]
    first = Results(MACHINE, records, results.host)
    lines = report.readme_blocks({"a": first, "b": results})["numbers"].splitlines()
    assert lines[0] == "| A CPU, torch 2.13.0 | `torch.nn.utils` | `gradclip_ext` |"
    assert [line.split(" | ", 1)[1] for line in lines[2:6]] == [
        "39 ms | 13 ms, **3.10x** |",
        "39 ms | 13 ms, **3.10x** |",
        "900 us | 15 us, **60.0x** |",
        "2.0e-03 | **2.0e-08** |",
    ]
    assert (
        lines[-1] == "![speed-up over torch.nn.utils, A CPU, torch 2.13.0](benchmarks/results/a-summary.png)"
    )
    assert len(lines) == 8


def test_what_was_not_measured_is_no_number(results: Results) -> None:
    """A row needs torch's figure and ours; a speed-up of something wrong is none."""
    lines = report.readme_blocks({"a": Results(MACHINE, results.records)})["numbers"].splitlines()
    assert lines[2:] == ["", lines[-1]]


def test_readme_has_a_small_table(results: Results) -> None:
    table = report.readme_blocks({"a": results})["table"]
    assert "| gradients | norm, nothing to clip | norm, clipping | value, all exceed |" in table
    rows = [line for line in table.splitlines() if line.startswith("| GPT-2")]
    assert rows == [
        "| GPT-2 (124M), float32: 148 tensors, 498 MB | 2.72x (86 %) | not measured | not measured |",
        "| GPT-2 (124M), bfloat16: 148 tensors, 498 MB | wrong | not measured | not measured |",
    ]
    assert "There is no results file of a GPU yet." in table
    on_gpu = Results({**MACHINE, "gpu": "A GPU", "driver": "1", "cuda": "13.0"}, results.records)
    assert "no results file of a GPU" not in report.readme_blocks({"a": results, "b": on_gpu})["table"]


def test_the_index_says_what_is_in_the_file(results: Results) -> None:
    text = report.index({"a": results})
    assert "| gpt2-124m, float32: 148 tensors, 498 MB | 2.72x (86 %) | not measured |" in text
    assert "| gpt2-124m, bfloat16: 148 tensors, 498 MB | wrong |" in text
    assert "median of 12 to 12 interleaved pairs" in text
    assert "call on 300 one-element tensors takes the host 15 us\nand 0.05 us for each further one" in text
    assert "`deepspeed` 0.18: slow." in text
    assert "Not measured: llama-3-8b in float32: it needs 64.1 GB." in text


def test_predictions_are_told_from_measurements(tmp_path: Path) -> None:
    text = "\n".join(second_pass.section(report.FOLDER))
    head = "| measured before | measured after | predicted after, H200 | predicted after, H100 |"
    assert f"| nothing to clip {head}" in text and f"| clipping {head}" in text
    assert "| gpt2-124m, float32 | 132.2 | 132.4 | 123 | 170 |" in text
    assert "| resnet-50, float32 | 91.0 | 87.5 | not predicted | not predicted |" in text
    assert "measured nowhere" in text
    assert list(second_pass.section(tmp_path)) == []


def test_what_torch_has_no_function_for_gets_a_table_of_its_own(results: Results, tmp_path: Path) -> None:
    results.records.append(replace(RECORD, op=STATS, speedup_vs_torch=9.5))
    block = report.readme_blocks({"a": results}, tmp_path)["beyond"]
    assert "over torch's operations" in block
    row = "| GPT-2 (124M), float32: 148 tensors, 498 MB | 9.50x (86 %) | not measured | not measured |"
    assert block.splitlines()[-1] == row
    assert "a-beyond.png" in report.index({"a": results}, tmp_path)
    if plot.available():
        report.draw("a", results, tmp_path)
        assert (tmp_path / "a-beyond.png").exists()


@pytest.mark.skipif(not plot.available(), reason="matplotlib is not installed")
def test_figures_carry_their_fingerprint(results: Results, tmp_path: Path) -> None:
    report.draw("a", results, tmp_path)
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == ["a-bandwidth.png", "a-host.png", "a-summary.png", "a.png"]
    for picture in pictures:
        assert plot.fingerprint(results).encode() in picture.read_bytes()


def test_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no pair of markers"):
        report.replaced("no markers", {"table": "block"})


def test_the_report_says_what_a_step_gains(results: Results) -> None:
    step = replace(RECORD, op="clip_grad_norm_+adamw", speedup_vs_torch=1.04)
    text = report.index({"a": Results(MACHINE, [RECORD, step])})
    assert "AdamW's step together, nothing to clip, on new gradients: 1.04x on gpt2-124m in float32." in text
