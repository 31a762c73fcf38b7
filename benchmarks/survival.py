"""``python -m benchmarks.survival``: a training with bad steps, clipped by torch and by what survives them.

Three GPTs with the same initial weights see the same batches. In some steps the loss is a spike (noise for
text, and a loss a thousand times as large), NaN or infinite. One model never sees these faults, one is
clipped by torch.nn.utils.clip_grad_norm_, and one by gradclip_ext.thresholds, with its bad steps skipped.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

import gradclip_ext
from benchmarks import machine, plot
from benchmarks.contenders import BASELINE
from benchmarks.gpt import BYTES, GPT, SHAPES, Batches, read_text
from benchmarks.plan import OUT, command_line, positive
from benchmarks.results import read_lines, write_lines
from gradclip_ext.thresholds import SpikeDetector, ZClip

OURS = "gradclip_ext"
NO_FAULTS = f"{BASELINE}, without faults"
_SUFFIX = "-survival"
_MAX_NORM = 1.0
# The factor of the loss, by the step as a share of all steps. With another factor than 1 the text is noise.
_SPIKE = 1e3
_FAULTS = {0.3: _SPIKE, 0.42: _SPIKE, 0.44: _SPIKE, 0.55: _SPIKE, 0.7: math.nan, 0.85: math.inf}
# How much larger than without faults the loss may be in the end. Two seeds are as far apart.
_TOLERANCE = 0.1


@dataclass
class Survivor:
    """One model that was trained.

    Args:
        name: of what clipped it.
        losses: of each step on the text without faults, in nats per byte; None where it is not finite.
        norms: of the gradients of each step before clipping; None where it is not finite.
        skipped: the steps that changed nothing, counted from 1.
    """

    name: str
    losses: list[float | None] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    @property
    def final_loss(self) -> float | None:
        """The mean loss of the last tenth of the steps; None where one is not finite."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return None if None in last else fmean(loss for loss in last if loss is not None)

    @property
    def label(self) -> str:
        """The name, with the step from which on the loss is not finite."""
        if self.losses[-1] is not None:
            return self.name
        finite = [step for step, loss in enumerate(self.losses, 1) if loss is not None]
        return f"{self.name}: NaN after step {max(finite, default=0)}"


@dataclass
class Survival:
    """The models that were trained on the same batches.

    Args:
        machine: the machine block.
        model, parameters: what was trained, in float32.
        faults: the factors of the loss by the step, counted from 1, as text: JSON has no NaN.
        runs: without faults, by torch.nn.utils, and by gradclip_ext.
    """

    machine: dict[str, Any]
    model: str
    parameters: int
    faults: dict[str, str]
    runs: list[Survivor]

    def save(self, path: Path) -> None:
        """Write the file: the machine, what was trained, then a line per run."""
        fields = asdict(self)
        block, runs = fields.pop("machine"), fields.pop("runs")
        write_lines(path, [("machine", block), ("survival", fields), *(("run", run) for run in runs)])

    @classmethod
    def load(cls, path: Path) -> Survival:
        """Read a file that save has written."""
        lines = read_lines(path)
        (block,), (fields,) = lines["machine"], lines["survival"]
        return cls(machine=block, **fields, runs=[Survivor(**run) for run in lines["run"]])

    def draw(self, path: Path) -> bool:
        """Draw losses and norms; return False without matplotlib."""
        losses = {run.label: _with_nan(run.losses) for run in self.runs}
        norms = {run.label: _with_nan(run.norms) for run in self.runs}
        return plot.training(losses, norms, _MAX_NORM, f"bad steps: {_listed(self.faults)}", path)

    def sentences(self) -> str:
        """Return in words what happened."""
        spikes = sum(math.isfinite(float(factor)) for factor in self.faults.values())
        without, theirs, ours = (_described(run.final_loss) for run in self.runs)
        skipped = sum(int(step) in self.runs[2].skipped for step in self.faults)
        clipped = len(self.faults) - skipped
        steps, size = len(self.runs[0].losses), f"{self.parameters / 1e6:.2g} M parameters"
        return (
            f"A GPT of {size} is trained for {steps} steps. In {spikes} of them the text is noise and the "
            f"loss {_SPIKE:,.0f} times as large, in {len(self.faults) - spikes} it is NaN or infinite. The "
            f"mean loss of the last tenth is {without} without these faults, {theirs} with `{BASELINE}` "
            f"(max_norm {_MAX_NORM:g}), and {ours} with `ZClip`, `SpikeDetector` and `skip_step_`, which "
            f"skipped {skipped} of these {len(self.faults)} steps and clipped the other {clipped}."
        )


def file_name(stem: str) -> str:
    """Return the name of the file that belongs to a results file."""
    return f"{stem}{_SUFFIX}.jsonl"


def is_survival(path: Path) -> bool:
    """Tell such a file from a results file by its name."""
    return path.stem.endswith(_SUFFIX)


def _with_nan(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _described(loss: float | None) -> str:
    return "NaN" if loss is None else f"{loss:.2f}"


def _listed(steps: Iterable[object]) -> str:
    return ", ".join(map(str, steps)) or "none"


# ---------------------------------------------------------------- training

# Returns the norm and, as a tensor, whether the next step is skipped.
Clip = Callable[[list[torch.nn.Parameter], AdamW], "tuple[Tensor, Tensor]"]


def clip_as_torch(parameters: list[torch.nn.Parameter], optimizer: AdamW) -> tuple[Tensor, Tensor]:
    """Clip by torch's function; no step is skipped."""
    return torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM), torch.tensor(False)


class ClipAndSkip:
    """Clip by a limit that follows the norms, and skip the steps whose norm is a spike."""

    def __init__(self, steps: int) -> None:
        self._rule = ZClip(max_norm=_MAX_NORM)
        self._detector = SpikeDetector(window=max(2, steps // 4))

    def __call__(self, parameters: list[torch.nn.Parameter], optimizer: AdamW) -> tuple[Tensor, Tensor]:
        norm = gradclip_ext.clip_grad_norm_(parameters, self._rule)
        is_spike = self._detector(norm)
        gradclip_ext.skip_step_(optimizer, is_spike)
        return norm, is_spike


def train(name: str, clip: Clip, faults: dict[int, float], steps: int, seed: int) -> tuple[Survivor, int]:
    """Train one model; return what happened and its number of parameters."""
    torch.manual_seed(seed)
    shape = SHAPES["small"]
    model = GPT(shape)
    batches = Batches(read_text(None), shape.context, 16, seed)
    parameters = list(model.parameters())
    optimizer = AdamW(parameters, lr=1e-3, fused=True)
    run = Survivor(name)
    for step in range(1, steps + 1):
        text = batches.next()
        loss = model(text)
        run.losses.append(_finite(loss))
        if step in faults:
            loss = faults[step] * model(torch.randint(BYTES, text.shape))
        optimizer.zero_grad()
        loss.backward()
        norm, is_skipped = clip(parameters, optimizer)
        optimizer.step()
        run.norms.append(_finite(norm))
        if is_skipped:
            run.skipped.append(step)
    return run, sum(p.numel() for p in parameters)


def _finite(value: Tensor) -> float | None:
    number = value.item()
    return number if math.isfinite(number) else None


def run_all(steps: int, seed: int) -> Survival:
    """Train the three models."""
    faults = {max(1, round(share * steps)): factor for share, factor in _FAULTS.items()}
    without, size = train(NO_FAULTS, clip_as_torch, {}, steps, seed)
    theirs, _ = train(BASELINE, clip_as_torch, faults, steps, seed)
    ours, _ = train(OURS, ClipAndSkip(steps), faults, steps, seed)
    texts = {str(step): str(factor) for step, factor in faults.items()}
    block = machine.describe(torch.device("cpu"))
    return Survival(block, "small", size, texts, [without, theirs, ours])


def problems(result: Survival) -> list[str]:
    """Return a sentence for every way in which ours did not survive."""
    # A spike soon after another is only clipped: the detector remembers the first.
    without, _, ours = result.runs
    found = []
    broken = {int(step) for step, factor in result.faults.items() if not math.isfinite(float(factor))}
    if broken - set(ours.skipped):
        found.append(f"the loss is not finite in steps {_listed(sorted(broken))}, which were not all skipped")
    assert without.final_loss is not None
    if ours.final_loss is None or ours.final_loss > (1.0 + _TOLERANCE) * without.final_loss:
        final = f"{_described(ours.final_loss)} in the end, {without.final_loss:.2f} without faults"
        found.append(f"the loss is {final}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print, draw and return the exit status: 0, or 1 if our model did not survive."""
    parser = command_line("benchmarks.survival", __doc__)
    parser.add_argument("--steps", type=positive, default=200, help="training steps. Default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches. Default: %(default)s")
    note = "default: benchmarks/out/<device>-torch<version>-survival.jsonl"
    parser.add_argument("--json", type=Path, metavar="FILE", help=note)
    settings = parser.parse_args(argv)
    path = settings.json or OUT / file_name(machine.file_name(torch.device("cpu")))
    torch.set_num_threads(1)
    result = run_all(settings.steps, settings.seed)
    print(result.sentences())
    for run in result.runs:
        print(f"{run.name:<32} final loss {_described(run.final_loss):>6}, skipped {_listed(run.skipped)}")
    result.save(path)
    print(f"results  {os.path.relpath(path)}")
    picture = path.with_suffix(".png")
    drawn = result.draw(picture)
    print(f"plot     {os.path.relpath(picture) if drawn else 'none: matplotlib is not installed'}")
    found = problems(result)
    for problem in found:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
