"""The results files: their contents, reading and writing them, and comparing two of them.

A file has one JSON object per line, which begins with its ``kind``; the first one is the machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.contenders import is_ours

# case, dtype, op, state, impl: what records of two files are compared by.
Key = tuple[str, str, str, str, str]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One operation on one case by one implementation.

    Args:
        case, tensors, numel, bytes, dtype, device, op, state, impl: what was measured.
        repeats: calls of each implementation, in turns; every figure below is a percentile or
            a median over that many.
        p20_us, p50_us, p80_us: time of one call; None if it was not timed.
        host_us: time until the call returns to the host while the GPU works on. None on a CPU,
            where that is the time of the call itself.
        launches: kernels, copies and fills the GPU was given; None on a CPU.
        scratch_bytes: peak GPU memory beyond what was there before; None on a CPU.
        gbps: bytes that have to move, over p50_us.
        bound_us: time to move them at the bandwidth measured right before.
        pct_of_bound: bound_us as a share of p50_us, in percent.
        speedup_vs_torch: torch's time over this one, median over pairs of calls side by side;
            None for an implementation that failed the gate.
        speedup_p20, speedup_p80: of the same pairs: the noise that ``--check`` allows for.
        max_rel_error: see gate.py; None if the call raised or an error is not finite.
        ok: whether the gate let it pass.
        problem: what is wrong, or what the implementation cannot do; None if nothing.
    """

    case: str
    tensors: int
    numel: int
    bytes: int
    dtype: str
    device: str
    op: str
    state: str
    impl: str
    repeats: int | None = None
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    host_us: float | None = None
    launches: int | None = None
    scratch_bytes: int | None = None
    gbps: float | None = None
    bound_us: float
    pct_of_bound: float | None = None
    speedup_vs_torch: float | None = None
    speedup_p20: float | None = None
    speedup_p80: float | None = None
    max_rel_error: float | None = None
    ok: bool
    problem: str | None = None

    @property
    def key(self) -> Key:
        """What names the record in its file."""
        return self.case, self.dtype, self.op, self.state, self.impl


@dataclass(frozen=True)
class HostTime:
    """Median time until ``clip_grad_norm_`` of that many one-element tensors returns, all warm."""

    impl: str
    tensors: int
    p50_us: float


@dataclass(frozen=True)
class Skipped:
    """A case that was asked for and not measured."""

    case: str
    dtype: str
    reason: str


@dataclass
class Results:
    """A results file: the machine, and what was measured on it."""

    machine: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    host: list[HostTime] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file.

        Raises:
            ValueError: it cannot be read, or is no results file.
        """
        lines = read_lines(path)
        try:
            (machine,) = lines.get("machine", [])
            return cls(
                machine,
                [Record(**fields) for fields in lines.get("record", ())],
                [HostTime(**fields) for fields in lines.get("host", ())],
                [Skipped(**fields) for fields in lines.get("skipped", ())],
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a results file of python -m benchmarks: {error!r}") from error

    def save(self, path: Path) -> None:
        """Write the file, see write_lines."""
        lines: list[tuple[str, Mapping[str, Any]]] = [("machine", self.machine)]
        for kind, items in (("record", self.records), ("host", self.host), ("skipped", self.skipped)):
            lines += [(kind, asdict(item)) for item in items]
        write_lines(path, lines)

    @property
    def title(self) -> str:
        """The device and the torch version."""
        return f"{self.machine['gpu'] or self.machine['cpu']}, torch {self.machine['torch']}"


@dataclass(frozen=True)
class Cost:
    """What one call costs the host: with 300 tensors, and for each tensor more, up to the largest list."""

    us_for_300: float
    us_per_further: float


def host_costs(host: Sequence[HostTime]) -> dict[str, Cost]:
    """Return what each implementation costs that was measured with 300 tensors and with the largest list."""
    us = {(h.impl, h.tensors): h.p50_us for h in host}
    last = max((h.tensors for h in host), default=0)
    return {
        impl: Cost(at_300, (us[impl, last] - at_300) / (last - 300))
        for (impl, tensors), at_300 in us.items()
        if tensors == 300 < last and (impl, last) in us
    }


# ---------------------------------------------------------------- --check FILE

# What is compared is the speed-up over torch.nn.utils, because torch ran side by side with it both times:
# a machine that is slower today slows both. A record counts as slower when four fifths of its pairs are
# below what four fifths of the pairs reached before, so every record is judged by the noise of its own
# repeats, and one is enough to fail. A run cannot see the noise between runs, so what looks slower is
# measured again, twice, and counts only if it is slower every time.

# An assumption: memory addresses differ between two runs, but not between the repeats of one run.
LAYOUT_NOISE = 0.03
SAME_MACHINE = ("cpu", "cores", "gpu", "torch")
SAME_CODE = (*SAME_MACHINE, "gradclip_ext", "commit")


def why_incomparable(here: Mapping[str, Any], before: Mapping[str, Any], fields: Sequence[str]) -> str | None:
    """Return how two machine blocks differ in these fields, or None if they do not."""
    for name in fields:
        if here[name] != before[name]:
            return f"its {name} is {before[name]!r}, here it is {here[name]!r}"
    return None


def has_noise(results: Results) -> bool:
    """Tell whether the file says how much its speed-ups vary; early ones do not."""
    return any(record.speedup_p20 is not None for record in results.records)


def regressions(now: Iterable[Record], before: Results) -> dict[Key, str]:
    """Return a sentence for every record of ours that became wrong or slower than noise allows."""
    earlier = {record.key: record for record in before.records}
    found = {}
    for record in now:
        old = earlier.get(record.key)
        if old is None or not old.ok or not is_ours(record.impl):
            continue
        problem = record.problem if not record.ok else _slower(record, old)
        if problem is not None:
            what = f"{record.case} {record.dtype} {record.op}:{record.state} {record.impl}"
            found[record.key] = f"{what}: {problem}"
    return found


def compared(now: Results, before: Results) -> int:
    """Return how many records of ours are in both files."""
    earlier = {record.key for record in before.records}
    return sum(is_ours(r.impl) and r.key in earlier for r in now.records)


def _slower(record: Record, old: Record) -> str | None:
    if record.speedup_p80 is None or old.speedup_p20 is None:
        return None
    if record.speedup_p80 >= old.speedup_p20 * (1 - LAYOUT_NOISE):
        return None
    return (
        f"{record.speedup_vs_torch:.2f}x ({record.speedup_p20:.2f}-{record.speedup_p80:.2f}), "
        f"was {old.speedup_vs_torch:.2f}x ({old.speedup_p20:.2f}-{old.speedup_p80:.2f})"
    )


# ---------------------------------------------------------------- training

_TRAINING_SUFFIX = "-train"
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


def training_file_name(stem: str) -> str:
    """Return the name of the training file that belongs to a results file."""
    return f"{stem}{_TRAINING_SUFFIX}.jsonl"


def is_training(path: Path) -> bool:
    """Tell a training file from a results file by its name."""
    return path.stem.endswith(_TRAINING_SUFFIX)


# ---------------------------------------------------------------- lines


def write_lines(path: Path, lines: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Write one JSON object per line, which begins with its kind.

    The file is written whole or not at all, so that a run that is killed leaves the previous one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps({"kind": kind, **fields}) + "\n" for kind, fields in lines))
    os.replace(part, path)


def read_lines(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the objects of a file that write_lines has written, by kind.

    Raises:
        ValueError: it cannot be read, or was written by something else.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        for line in path.read_text().splitlines():
            fields = json.loads(line)
            found.setdefault(fields.pop("kind"), []).append(fields)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a results file of python -m benchmarks: {error!r}") from error
    return found
