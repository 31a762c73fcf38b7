"""Training side by side: one model per way to clip, the same weights and the same batches."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.gpt import GPT, SHAPES, Batches, Shape, read_text
from benchmarks.progress import Progress
from benchmarks.training_results import ROWS, RunResults, Training

Clip = Callable[..., Tensor]

# The two norms differ in their last digit, and training amplifies that: on a CPU the losses of a step
# were 1e-6 apart after 150 steps and 2e-4 after 500. A row, the mean over a fifteenth of all steps,
# moves by 1e-2 only when something is wrong. In bfloat16 torch's norm and every weight have three
# digits; its tolerance is an estimate.
_LOSS_TOLERANCES = {"float32": 1e-2, "bfloat16": 5e-2}
# Before the first update all models have the same gradients. torch's own float32 error is below 1e-6;
# in bfloat16 it rounds every tensor's norm, and their norm, by up to 2^-9.
_NORM_TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}


class Run:
    """One model in training.

    Args:
        name: of what clips.
        clip: torch.nn.utils.clip_grad_norm_, a replacement, or None for no clipping.
        settings: the command line.
    """

    def __init__(self, name: str, clip: Clip | None, settings: argparse.Namespace) -> None:
        torch.manual_seed(settings.seed)
        self.results = RunResults(name)
        self._clip = clip
        self._max_norm: float = settings.max_norm
        self._device: torch.device = settings.device
        model = GPT(SHAPES[settings.model]).to(self._device, settings.dtype)
        self._parameters = list(model.parameters())
        self._loss: Callable[[Tensor], Tensor] = torch.compile(model) if settings.compile else model
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-3 if settings.model == "small" else 3e-4)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self._parameters)

    def step(self, texts: Sequence[Tensor]) -> None:
        """Train on one batch, or on several whose gradients are accumulated."""
        started = self._now()
        self._optimizer.zero_grad()
        losses = []
        for text in texts:
            loss = self._loss(text) / len(texts)
            loss.backward()
            losses.append(loss.detach())
        norm = None
        if self._clip is not None:
            norm, clip_ms = self._timed_clip(self._clip)
        self._optimizer.step()
        self.results.step_ms.append(1e3 * (self._now() - started))
        self.results.losses.append(sum(loss.item() for loss in losses))
        if norm is not None:
            self.results.norms.append(norm.item())
            self.results.clip_ms.append(clip_ms())

    def _timed_clip(self, clip: Clip) -> tuple[Tensor, Callable[[], float]]:
        """Return the norm, and what tells the milliseconds once the step is over: no wait within it."""
        if self._device.type != "cuda":
            before = time.perf_counter()
            norm = clip(self._parameters, self._max_norm)
            elapsed = 1e3 * (time.perf_counter() - before)
            return norm, lambda: elapsed
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        norm = clip(self._parameters, self._max_norm)
        end.record()
        return norm, lambda: float(start.elapsed_time(end))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def train(settings: argparse.Namespace, clips: dict[str, Clip]) -> Training:
    """Train one model per way to clip and print a row per fifteenth of the steps; Ctrl-C ends it early.

    Args:
        settings: the command line.
        clips: name to function; the first is the one to compare with.
    """
    shape: Shape = SHAPES[settings.model]
    batches = Batches(read_text(settings.text), shape.context, settings.batch, settings.seed)
    clipped = [Run(name, clip, settings) for name, clip in clips.items()]
    runs = [*clipped, Run("no clipping", None, settings)]
    every = max(1, settings.steps // ROWS)
    with Progress(settings.steps) as progress:
        names = "".join(f" {name:>21}" for name in clips)
        progress.write(f"{'mean loss':>13}{names} {'norm':>8} {'clipped':>8}")
        try:
            for number in range(settings.steps):
                texts = [batches.next().to(settings.device) for _ in range(settings.accumulate)]
                # Turns alternate, so that nobody is always the one that finds the caches warm.
                first = number % len(runs)
                for run in runs[first:] + runs[:first]:
                    run.step(texts)
                progress.label("loss " + " ".join(f"{run.results.losses[-1]:.3f}" for run in clipped))
                progress.advance(1)
                if (number + 1) % every == 0:
                    steps = slice(number + 1 - every, number + 1)
                    progress.write(_row([run.results for run in clipped], steps, settings.max_norm))
        except KeyboardInterrupt:
            progress.write("Interrupted: what follows is about the steps taken so far.")
    taken = min(len(run.results.losses) for run in runs)
    for run in runs:
        run.results.cut(taken)
    return Training(
        machine=machine.describe(settings.device),
        model=settings.model,
        parameters=runs[0].parameters,
        dtype=str(settings.dtype).removeprefix("torch."),
        max_norm=settings.max_norm,
        batch=settings.batch,
        accumulate=settings.accumulate,
        compiled=settings.compile,
        clipped=[run.results for run in clipped],
        unclipped=runs[-1].results,
    )


def loss_tolerance(result: Training) -> float:
    """Return how far the mean losses of a row may be apart."""
    return _LOSS_TOLERANCES[result.dtype]


def disagreements(result: Training) -> list[str]:
    """Return a sentence for every way in which a run differs from the first by more than it may."""
    found = []
    expected = result.clipped[0]
    most_norm, most_loss = _NORM_TOLERANCES[result.dtype], loss_tolerance(result)
    for run in result.clipped[1:]:
        norm_error = abs(run.norms[0] - expected.norms[0]) / expected.norms[0]
        if not norm_error <= most_norm:
            found.append(
                f"the first gradient norms differ by {norm_error:.1e}, {most_norm:.0e} is allowed: "
                f"{expected.norms[0]:.6g} by {expected.name}, {run.norms[0]:.6g} by {run.name}"
            )
        worst = next((d for d in result.row_differences(run) if not d <= most_loss), None)
        if worst is not None:
            found.append(
                f"the losses of {run.name} and {expected.name} differ by {worst:.1e} over a row, "
                f"{most_loss:.0e} is allowed"
            )
    return found


def _row(runs: Sequence[RunResults], steps: slice, max_norm: float) -> str:
    norms = runs[0].norms[steps]
    clipped = sum(norm > max_norm for norm in norms) / len(norms)
    columns = "".join(f" {fmean(run.losses[steps]):>21.4f}" for run in runs)
    span = f"{steps.start + 1}-{steps.stop}"
    return f"{span:>13}{columns} {fmean(norms):>8.3f} {clipped:>8.0%}"
