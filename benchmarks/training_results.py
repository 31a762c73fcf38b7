"""What a training comparison measured, as a file and as a sentence."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.results import read_lines, write_lines

_SUFFIX = "-train"
# Rows of the table, and stretches of steps over which losses are compared.
ROWS = 15


@dataclass
class RunResults:
    """One model that was trained.

    Args:
        name: of what clipped it.
        losses: of each step, in nats per byte.
        norms: of the gradients of each step before clipping; empty without clipping.
        step_ms, clip_ms: time of each step, and of the clipping in it; clip_ms is empty without.
    """

    name: str
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    clip_ms: list[float] = field(default_factory=list)

    @property
    def clip_share(self) -> float:
        """The median share of a step that clipping took."""
        return median(clip / step for clip, step in zip(self.clip_ms, self.step_ms))

    def active(self, max_norm: float) -> int:
        """Return in how many steps clipping changed the gradients."""
        return sum(norm > max_norm for norm in self.norms)

    def cut(self, steps: int) -> None:
        """Forget what comes after this many steps."""
        for values in (self.losses, self.norms, self.step_ms, self.clip_ms):
            del values[steps:]


@dataclass
class Training:
    """All models that were trained side by side.

    Args:
        machine: the machine block.
        model, parameters, dtype: what was trained.
        max_norm, batch, accumulate, compiled: how.
        clipped: the runs to compare; the first is torch's.
        unclipped: the run without any clipping, for its step time.
    """

    machine: dict[str, Any]
    model: str
    parameters: int
    dtype: str
    max_norm: float
    batch: int
    accumulate: int
    compiled: bool
    clipped: list[RunResults]
    unclipped: RunResults

    @property
    def steps(self) -> int:
        return len(self.unclipped.losses)

    def difference(self) -> float:
        """Return the largest difference of mean losses over a row between a run and torch's."""
        return max(max(self.row_differences(run)) for run in self.clipped[1:])

    def row_differences(self, run: RunResults) -> list[float]:
        """Return for each row how far the run's mean loss is from torch's."""
        every = max(1, self.steps // ROWS)
        starts = range(0, self.steps, every)
        means = [
            (fmean(run.losses[s : s + every]), fmean(self.clipped[0].losses[s : s + every])) for s in starts
        ]
        return [abs(ours - theirs) for ours, theirs in means]

    def save(self, path: Path) -> None:
        """Write the file: the machine, what was trained, then a line per run."""
        fields = asdict(self)
        machine, clipped, unclipped = (fields.pop(name) for name in ("machine", "clipped", "unclipped"))
        runs = [("clipped", run) for run in clipped]
        write_lines(path, [("machine", machine), ("training", fields), *runs, ("unclipped", unclipped)])

    @classmethod
    def load(cls, path: Path) -> Training:
        """Read a file that save has written."""
        lines = read_lines(path)
        (machine,), (fields,), (unclipped,) = (lines[kind] for kind in ("machine", "training", "unclipped"))
        clipped = [RunResults(**run) for run in lines["clipped"]]
        return cls(machine=machine, **fields, clipped=clipped, unclipped=RunResults(**unclipped))


def file_name(stem: str) -> str:
    """Return the name of the training file that belongs to a results file."""
    return f"{stem}{_SUFFIX}.jsonl"


def is_one(path: Path) -> bool:
    """Tell a training file from a results file by its name."""
    return path.stem.endswith(_SUFFIX)


def sentence(path: Path) -> str:
    """Return what the file says, in words."""
    found = Training.load(path)
    size = f"{found.parameters / 1e6:.3g} M parameters, {found.dtype}"
    took = ", ".join(
        f"{1e3 * median(run.clip_ms):,.0f} µs ({run.clip_share:.2%}) by `{run.name}`" for run in found.clipped
    )
    return (
        f"Training {found.model} ({size}) for {found.steps} steps with max_norm {found.max_norm:g}, "
        f"clipping took this much of a step: {took}. As means over a fifteenth of the steps, "
        f"losses differ by {found.difference():.1e} at most.\n"
    )
