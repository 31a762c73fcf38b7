"""python -m benchmarks.train: runs that agree, runs that do not, and arguments that it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gradclip_ext
from benchmarks import plot, report, train
from benchmarks.cases import CASES
from benchmarks.gpt import GPT, SHAPES
from benchmarks.results import Training, is_training
from gradclip_ext import backends

SHORT = ["--device", "cpu", "--steps", "6", "--batch", "2"]


def test_training_agrees_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu-train.jsonl"
    assert train.main([*SHORT, "--accumulate", "2", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "The curves agree" in printed
    assert "active, of 6 steps" in printed
    assert path.with_suffix(".png").exists() == plot.available()
    found = Training.load(path)
    assert [run.name for run in found.clipped] == list(train.clips(torch.device("cpu")))
    assert all(len(run.losses) == len(run.norms) == len(run.clip_ms) == 6 for run in found.clipped)
    assert len(found.unclipped.step_ms) == 6
    assert is_training(path)
    assert f"differ by {found.difference():.1e} at most" in report.training_sentence(path)


def test_a_backend_that_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(backends.ALL["foreach"], "norm", fails)
    named = train.clips(torch.device("cpu"))
    assert "torch.nn.utils" in named and "gradclip_ext[foreach]" not in named
    assert "gradclip_ext[foreach] is left out: RuntimeError: no C compiler" in capsys.readouterr().err


def test_accumulated_gradients_are_those_of_one_large_batch() -> None:
    text = torch.arange(4 * 65).remainder(256).view(4, 65)
    settings = train.parse(SHORT)
    norms = []
    for texts in ([text], [text[:2], text[2:]]):
        run = train.Run("torch", torch.nn.utils.clip_grad_norm_, settings)
        run.step(texts)
        norms += run.results.norms
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_the_model_on_a_gpu_has_the_shapes_of_gpt2() -> None:
    with torch.device("meta"):
        shapes = [p.shape for p in GPT(SHAPES["gpt2-124m"]).parameters()]
    case = CASES["gpt2-124m"]
    assert (len(shapes), sum(map(math.prod, shapes))) == (case.tensors, case.numel)


def _no_clipping(parameters: list[Tensor], max_norm: float) -> Tensor:
    return gradclip_ext.clip_grad_norm_(parameters, math.inf)


def _norm_of_the_first(parameters: list[Tensor], max_norm: float) -> Tensor:
    return gradclip_ext.clip_grad_norm_(parameters[:1], max_norm)


@pytest.mark.parametrize(
    ("clip", "message"),
    [(_no_clipping, "the losses of wrong"), (_norm_of_the_first, "gradient norms differ")],
)
def test_training_notices_wrong_clipping(clip: Callable[..., Tensor], message: str) -> None:
    settings = train.parse([*SHORT, "--steps", "10", "--max-norm", "1e-7"])
    clips = {"torch.nn.utils": torch.nn.utils.clip_grad_norm_, "wrong": clip}
    problems = train.disagreements(train.train(settings, clips))
    assert any(message in problem for problem in problems)


def test_interrupted_training_keeps_its_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = train.Run.step
    calls = []

    def interrupted(run: train.Run, texts: list[Tensor]) -> None:
        calls.append(run)
        if len(calls) > 10:
            raise KeyboardInterrupt
        step(run, texts)

    monkeypatch.setattr(train.Run, "step", interrupted)
    path = tmp_path / "train.jsonl"
    assert train.main([*SHORT, "--json", str(path)]) == 130
    assert "Interrupted" in capsys.readouterr().out
    assert Training.load(path).steps == 10 // (len(train.clips(torch.device("cpu"))) + 1)


def test_training_says_what_is_wrong_with_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert train.main([*SHORT, "--text", str(short)]) == 2
    assert "the text has 9 bytes" in capsys.readouterr().err
    assert train.main([*SHORT, "--text", str(tmp_path / "missing.txt")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err
