"""What a results file holds, and how it is read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
            None for whatever failed the gate.
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
            (machine,) = lines.get("machine", ())
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
