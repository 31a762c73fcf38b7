"""``python -m benchmarks.train``: train the same GPT with torch's clipping and with ours, and compare.

Models with the same initial weights see the same batches, step by step in turn. One is clipped by
torch.nn.utils.clip_grad_norm_, one by each gradclip_ext backend that works here, and one is not
clipped at all, for its step time; nothing else differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor

from benchmarks import contenders, machine, plot
from benchmarks.contenders import BASELINE
from benchmarks.gpt import GPT, SHAPES, Batches, Shape, read_text
from benchmarks.plan import OUT, command_line, positive
from benchmarks.results import ROWS, RunResults, Training, training_file_name
from benchmarks.terminal import Progress

_EXAMPLES = """examples:
  python -m benchmarks.train                        a small GPT on a CPU, GPT-2 124M in bfloat16 on a GPU
  python -m benchmarks.train --text war-and-peace.txt --steps 500
  python -m benchmarks.train --max-norm 0.25 --batch 32 --accumulate 4 --compile
  python -m benchmarks.train --device cpu --threads 2 --seed 1

Exit status 1 if loss curves or first gradient norms do not agree.
"""


# ---------------------------------------------------------------- side by side

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
                # Another run begins at every step, so that no run always finds the caches warm.
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
    norm_tolerance, loss_limit = _NORM_TOLERANCES[result.dtype], loss_tolerance(result)
    for run in result.clipped[1:]:
        norm_error = abs(run.norms[0] - expected.norms[0]) / expected.norms[0]
        if not norm_error <= norm_tolerance:
            found.append(
                f"the first gradient norms differ by {norm_error:.1e}, {norm_tolerance:.0e} is allowed: "
                f"{expected.norms[0]:.6g} by {expected.name}, {run.norms[0]:.6g} by {run.name}"
            )
        worst = next((d for d in result.row_differences(run) if not d <= loss_limit), None)
        if worst is not None:
            found.append(
                f"the losses of {run.name} and {expected.name} differ by {worst:.1e} over a row, "
                f"{loss_limit:.0e} is allowed"
            )
    return found


def _row(runs: Sequence[RunResults], steps: slice, max_norm: float) -> str:
    norms = runs[0].norms[steps]
    clipped = sum(norm > max_norm for norm in norms) / len(norms)
    columns = "".join(f" {fmean(run.losses[steps]):>21.4f}" for run in runs)
    span = f"{steps.start + 1}-{steps.stop}"
    return f"{span:>13}{columns} {fmean(norms):>8.3f} {clipped:>8.0%}"


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print, plot and return the exit status: 0, 1 for a disagreement, 2 for bad arguments."""
    settings = parse(argv)
    if settings.device.type == "cpu":
        torch.set_num_threads(settings.threads)
    try:
        result = train(settings, clips(settings.device))
    except ValueError as error:
        print(f"python -m benchmarks.train: {error}", file=sys.stderr)
        return 2
    if not result.steps:
        return 130
    _print_summary(result)
    result.save(settings.json)
    print(f"\nresults  {os.path.relpath(settings.json)}")
    picture = settings.json.with_suffix(".png")
    curves = {run.name: run.losses for run in result.clipped}, {run.name: run.norms for run in result.clipped}
    title = f"{result.model}, {result.dtype}: mean losses differ by {result.difference():.1e} at most"
    if plot.training(*curves, result.max_norm, title, picture):
        print(f"plot     {os.path.relpath(picture)}")
    else:
        print("plot     none: matplotlib is not installed (pip install matplotlib)")
    problems = disagreements(result)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    if problems:
        return 1
    print(f"The curves agree: means over a row differ by {result.difference():.1e} at most, "
          f"{loss_tolerance(result):g} is allowed.")  # fmt: skip
    return 0 if result.steps == settings.steps else 130


def clips(device: torch.device) -> dict[str, Clip]:
    """Return torch's clipping and that of every backend that handles the device, by name.

    Each is tried first, because a Triton without a C compiler shows only then: it is left out, with the
    reason, and the others train.
    """
    found, _ = contenders.available(device)
    usable = {}
    for name, implementation in found.items():
        if name != BASELINE and not implementation.is_ours:
            continue
        clip = implementation.functions["clip_grad_norm_"]
        parameter = torch.nn.Parameter(torch.ones(2, device=device))
        parameter.grad = torch.ones(2, device=device)
        try:
            clip([parameter], 1.0)
        except Exception as error:
            print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            usable[name] = clip
    return usable


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line as settings."""
    parser = command_line("benchmarks.train", __doc__, _EXAMPLES)
    add = parser.add_argument
    add("--steps", type=positive, default=90, help="training steps of each model. Default: %(default)s")
    add("--max-norm", type=float, default=1.0, help="clip gradients to this norm. Default: %(default)s")
    add("--batch", type=positive, default=16, help="excerpts of text per backward. Default: %(default)s")
    add("--accumulate", type=positive, default=1, metavar="N", help="backwards per step. Default: 1")
    add("--compile", action="store_true", help="train through torch.compile")
    add("--text", type=Path, metavar="FILE", help="train on this file. Default: Python's standard library")
    add("--model", choices=SHAPES, help="default: gpt2-124m in bfloat16 on a GPU, small in float32 else")
    add("--device", default="auto", help="auto, cpu or cuda. Default: auto")
    add("--threads", type=positive, default=1, help="CPU threads; so small a model gains little. Default: 1")
    add("--seed", type=int, default=0, help="of weights and batches. Default: %(default)s")
    note = "default: benchmarks/out/<device>-torch<version>-train.jsonl"
    add("--json", type=Path, metavar="FILE", help=note)
    settings = parser.parse_args(argv)
    if not settings.max_norm >= 0.0:
        parser.error(f"--max-norm must be 0 or more, got {settings.max_norm}")
    if settings.device == "auto":
        settings.device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device not in ("cpu", "cuda"):
        parser.error(f"--device must be auto, cpu or cuda, got {settings.device}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU was found")
    settings.device = torch.device(settings.device)
    on_gpu = settings.device.type == "cuda"
    settings.model = settings.model or ("gpt2-124m" if on_gpu else "small")
    settings.dtype = torch.bfloat16 if on_gpu else torch.float32
    settings.json = settings.json or OUT / training_file_name(machine.file_name(settings.device))
    return settings


def _print_summary(result: Training) -> None:
    runs = [*result.clipped, result.unclipped]
    width = max(16, *(len(run.name) + 1 for run in runs))

    def line(title: str, values: Sequence[str]) -> None:
        print(f"{title:<26}" + "".join(f"{value:>{width}}" for value in values))

    print(f"\n{result.model}, {result.parameters:,} parameters, {result.dtype}, max_norm {result.max_norm:g}")
    line("", [run.name for run in runs])
    line("step, median", [f"{median(run.step_ms):.2f} ms" for run in runs])
    clipped = result.clipped
    line("of which clipping, median", [f"{median(run.clip_ms):.3f} ms" for run in clipped])
    line("share of the step, median", [f"{run.clip_share:.2%}" for run in clipped])
    line(f"active, of {result.steps} steps", [str(run.active(result.max_norm)) for run in clipped])
    line("gradient norm, largest", [f"{max(run.norms):.4f}" for run in clipped])
    line("loss of the first step", [f"{run.losses[0]:.4f}" for run in runs])
    line("loss of the last step", [f"{run.losses[-1]:.4f}" for run in runs])
    largest = [max(abs(a - b) for a, b in zip(run.losses, clipped[0].losses)) for run in clipped[1:]]
    line("largest difference, a step", ["", *(f"{difference:.1e}" for difference in largest)])


if __name__ == "__main__":
    sys.exit(main())
