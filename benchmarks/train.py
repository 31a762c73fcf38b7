"""``python -m benchmarks.train``: train the same GPT with torch's clipping and with ours, and compare.

Models with the same initial weights see the same batches, step by step in turn. One is clipped by
torch.nn.utils.clip_grad_norm_, one by each gradclip_ext backend that works here, and one is not
clipped at all, for its step time; nothing else differs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import implementations, machine, plot
from benchmarks.gpt import SHAPES
from benchmarks.implementations import BASELINE, OURS
from benchmarks.options import positive
from benchmarks.training import Clip, disagreements, loss_tolerance, train
from benchmarks.training_results import Training, file_name

OUT = Path(__file__).parent / "out"

_EXAMPLES = """examples:
  python -m benchmarks.train                        a small GPT on a CPU, GPT-2 124M in bfloat16 on a GPU
  python -m benchmarks.train --text war-and-peace.txt --steps 500
  python -m benchmarks.train --max-norm 0.25 --batch 32 --accumulate 4 --compile
  python -m benchmarks.train --device cpu --threads 2 --seed 1

Exit status 1 if loss curves or first gradient norms do not agree.
"""


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
    """Return torch's clipping and that of every backend that serves the device, by name.

    Each is tried first, because a Triton without a C compiler shows only then: it is left out, with the
    reason, and the others train.
    """
    found, _ = implementations.available(device)
    serving = {}
    for name, implementation in found.items():
        if name != BASELINE and not name.startswith(OURS):
            continue
        clip = implementation.functions["clip_grad_norm_"]
        parameter = torch.nn.Parameter(torch.ones(2, device=device))
        parameter.grad = torch.ones(2, device=device)
        try:
            clip([parameter], 1.0)
        except Exception as error:
            print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            serving[name] = clip
    return serving


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line as settings."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description=(__doc__ or "").partition(": ")[2],
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    settings.json = settings.json or OUT / file_name(machine.file_name(settings.device))
    return settings


def _print_summary(result: Training) -> None:
    runs = [*result.clipped, result.unclipped]
    wide = max(16, *(len(run.name) + 1 for run in runs))

    def line(title: str, values: Sequence[str]) -> None:
        print(f"{title:<26}" + "".join(f"{value:>{wide}}" for value in values))

    print(f"\n{result.model}, {result.parameters:,} parameters, {result.dtype}, max_norm {result.max_norm:g}")
    line("", [run.name for run in runs])
    line("step, median", [f"{statistics.median(run.step_ms):.2f} ms" for run in runs])
    clipped = result.clipped
    line("of which clipping, median", [f"{statistics.median(run.clip_ms):.3f} ms" for run in clipped])
    line("share of the step, median", [f"{run.clip_share:.2%}" for run in clipped])
    line(f"active, of {result.steps} steps", [str(run.active(result.max_norm)) for run in clipped])
    line("gradient norm, largest", [f"{max(run.norms):.4f}" for run in clipped])
    line("loss of the first step", [f"{run.losses[0]:.4f}" for run in runs])
    line("loss of the last step", [f"{run.losses[-1]:.4f}" for run in runs])
    largest = [max(abs(a - b) for a, b in zip(run.losses, clipped[0].losses)) for run in clipped[1:]]
    line("largest difference, a step", ["", *(f"{difference:.1e}" for difference in largest)])


if __name__ == "__main__":
    sys.exit(main())
