"""The command line of ``python -m benchmarks``: its options, and the plan that is made from them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from benchmarks import contenders, machine, results
from benchmarks.cases import CASES, DEFAULT_CASES, DTYPES, Case, why_not_measurable
from benchmarks.contenders import BASELINE, LOOP, Implementation
from benchmarks.measure import ENOUGH_REPEATS
from benchmarks.operations import BEYOND_TORCH, OPERATIONS, Operation
from benchmarks.results import Results, Skipped

# The operations to be measured, by case and dtype.
Work = dict[tuple[Case, str], list[Operation]]
OUT = Path(__file__).parent / "out"


@dataclass(frozen=True)
class Extent:
    """How much is measured unless an option says otherwise.

    Args:
        cases, dtypes: names.
        more_cases: those on which AdamW's step and what torch.nn.utils has no function for is measured, too,
            unless --ops names it; torch takes many times as long for these.
        loop: whether torch's loop is measured, too.
        seconds: for one operation on one case, if the repeats allow.
        host_rounds: see measure.host_times.
    """

    cases: tuple[str, ...]
    more_cases: tuple[str, ...]
    dtypes: tuple[str, ...]
    loop: bool
    seconds: float
    host_rounds: int


QUICK = Extent(DEFAULT_CASES, DEFAULT_CASES[1:], ("float32",), loop=False, seconds=0.5, host_rounds=3)
USUAL = Extent(DEFAULT_CASES, DEFAULT_CASES, ("float32", "bfloat16"), loop=False, seconds=3.0, host_rounds=10)
FULL = Extent(tuple(CASES), DEFAULT_CASES, DTYPES, loop=True, seconds=0.5, host_rounds=10)

_EXAMPLES = """examples:
  python -m benchmarks                  the default cases, on the GPU if there is one
  python -m benchmarks --quick          the same in about a minute: float32, fewer repeats
  python -m benchmarks --full           all cases, dtypes and implementations
  python -m benchmarks --full --resume  the rest of it, if something ended it
  python -m benchmarks --check before.jsonl
  python -m benchmarks --list           what --cases, --dtypes, --ops and --impls accept here
  python -m benchmarks --cases resnet-50 vit-b-16 --dtypes float32 mixed
  python -m benchmarks --cases all --ops get_total_norm clip_grad_norm_:clipped
  python -m benchmarks --cases all --ops clip_grad_norm_+adamw
  python -m benchmarks --impls foreach loop --device cpu --repeats 30

Every implementation is compared with float64 before it is timed: one that is wrong is shown
with its error and without a speed-up. The file is written after every case, so whatever ends a
run, --resume goes on from there. Send us the file if your machine is not among the results; it
names the hardware and the versions, no path, user or host.
"""


class UsageError(Exception):
    """What was asked for cannot be measured here; the message says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """What a command line asks for, checked.

    Args:
        device: where.
        found, missing: implementations that can be measured here, and why others cannot.
        chosen: those to be measured.
        work: operations to be measured, by case and dtype.
        skipped: what cannot be measured.
        repeats, extent: how long.
        path: of the results file.
        before: the results to compare with, or None.
        kept: the results to go on from, or None.
    """

    device: torch.device
    found: dict[str, Implementation]
    missing: dict[str, str]
    chosen: list[Implementation]
    work: Work
    skipped: list[Skipped]
    repeats: int | None
    extent: Extent
    path: Path
    before: Results | None
    kept: Results | None


def positive(text: str) -> int:
    """Return ``text`` as an integer of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def command_line(module: str, doc: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """Return a parser for ``python -m module``, described by what follows the first colon of ``doc``."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=(doc or "").partition(": ")[2] or doc,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options as they were given."""
    description = "Measure torch.nn.utils against every gradclip_ext backend on this machine."
    parser = command_line("benchmarks", description, _EXAMPLES)
    size = parser.add_mutually_exclusive_group()
    note = "float32, fewer repeats: about a minute on two idle cores"
    size.add_argument("--quick", dest="extent", action="store_const", const=QUICK, default=USUAL, help=note)
    note = "all cases and dtypes, and torch's loop, too"
    size.add_argument("--full", dest="extent", action="store_const", const=FULL, help=note)
    add = parser.add_argument
    add("--list", action="store_true", help="print what can be measured here, and stop")
    note = f"shape lists; all for all. Default: {' '.join(USUAL.cases)}"
    add("--cases", nargs="+", metavar="NAME", help=note)
    note = f"of the gradients; all for all. Default: {' '.join(USUAL.dtypes)}"
    add("--dtypes", nargs="+", metavar="NAME", help=note)
    note = "operation, or operation:state. Default: all"
    add("--ops", nargs="+", metavar="NAME", default=["all"], help=note)
    note = "torch, loop, a backend or a peer; torch is always measured along. Default: all but loop"
    add("--impls", nargs="+", metavar="NAME", help=note)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>. Default: auto")
    note = f"calls of each. Default: what a few seconds allow, {ENOUGH_REPEATS} at least"
    add("--repeats", type=positive, metavar="N", help=note)
    add("--json", type=Path, metavar="FILE", help="default: benchmarks/out/<device>-torch<version>.jsonl")
    add("--resume", action="store_true", help="measure only what the results file does not have yet")
    note = "exit with 1 if a case is slower than in FILE beyond its own noise"
    add("--check", type=Path, metavar="FILE", help=note)
    arguments = parser.parse_args(argv)
    if arguments.check and arguments.repeats and arguments.repeats < ENOUGH_REPEATS:
        parser.error(f"--check judges by noise, and that takes --repeats {ENOUGH_REPEATS} or more")
    return arguments


def plan(arguments: argparse.Namespace) -> Plan:
    """Return the plan for the options.

    Raises:
        UsageError: they name something that does not exist here.
    """
    extent: Extent = arguments.extent
    device = _device(arguments.device)
    found, missing = contenders.available(device)
    cases = [CASES[name] for name in _chosen("case", arguments.cases or extent.cases, list(CASES))]
    dtypes = _chosen("dtype", arguments.dtypes or extent.dtypes, DTYPES)
    path = _results_path(arguments.json, device)
    work, skipped = _work(cases, dtypes, arguments.ops, extent, device)
    return Plan(
        device=device,
        found=found,
        missing=missing,
        chosen=_implementations(arguments.impls, extent, found, missing),
        work=work,
        skipped=skipped,
        repeats=arguments.repeats,
        extent=extent,
        path=path,
        before=_before(arguments.check, device),
        kept=_kept(arguments.resume, path, device),
    )


def _work(
    cases: Sequence[Case], dtypes: Sequence[str], names: Sequence[str], extent: Extent, device: torch.device
) -> tuple[Work, list[Skipped]]:
    """Return what to measure and what cannot be measured."""
    # Read once, before anything is allocated: later, torch's allocators keep the memory they have.
    cache, free = machine.cache_bytes(device), machine.free_bytes(device)
    work: Work = {}
    skipped = []
    for case, dtype in product(cases, dtypes):
        operations = _operations(names)
        if "all" in names and case.name not in extent.more_cases:
            operations = [o for o in operations if not (o.with_step or o.function in BEYOND_TORCH)]
        reasons = {o: why_not_measurable(case, dtype, o, cache, free) for o in operations}
        measurable = [o for o, reason in reasons.items() if reason is None]
        messages = [reason for reason in dict.fromkeys(reasons.values()) if reason is not None]
        if measurable:
            work[case, dtype] = measurable
        else:
            messages = messages[:1]
        skipped += [Skipped(case.name, dtype, message) for message in messages]
    return work, skipped


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"there is no device {name!r}: use auto, cpu, cuda or cuda:<index>") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda are measured so far")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(
                f"--device {name}: no GPU was found. Is this a CUDA build of torch (here: "
                f"{torch.__version__})? Use --device cpu to measure the CPU"
            )
        count, index = torch.cuda.device_count(), device.index or 0
        if index >= count:
            raise UsageError(f"--device {name}: there are {count} GPUs, the last one is cuda:{count - 1}")
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
    return device


def _chosen(kind: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the named ones in the order of ``known``, each once."""
    wanted = set(known) if "all" in names else set(names)
    unknown = wanted - set(known)
    if unknown:
        raise UsageError(f"unknown {kind} {', '.join(sorted(unknown))}; there are: {', '.join(known)}, all")
    return [name for name in known if name in wanted]


def _operations(names: Sequence[str]) -> list[Operation]:
    by_label = {operation.label: operation for operation in OPERATIONS}
    labels = []
    for name in names:
        labels += [label for label in by_label if label.split(":")[0] == name] or [name]
    return [by_label[label] for label in _chosen("operation", labels, list(by_label))]


def _implementations(
    names: Sequence[str] | None, extent: Extent, found: dict[str, Implementation], missing: dict[str, str]
) -> list[Implementation]:
    """Return the chosen implementations; torch.nn.utils always, because ratios need it."""
    if names is None:
        return [i for i in found.values() if extent.loop or i.name != LOOP]
    full = [contenders.full_name(name) for name in names]
    for name in full:
        if name in missing:
            raise UsageError(f"{name} cannot be measured here: {missing[name]}")
    return [found[name] for name in _chosen("implementation", [BASELINE, *full], list(found))]


def _results_path(path: Path | None, device: torch.device) -> Path:
    """Return the path of the results. Check that it is writable now, not after the work."""
    path = path or OUT / f"{machine.file_name(device)}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written: {error.strerror}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"--json {path} cannot be written: it is a folder, or write-protected")
    return path


def _before(path: Path | None, device: torch.device) -> Results | None:
    if path is None:
        return None
    before = _read("--check", path, device, results.SAME_MACHINE)
    if not results.has_noise(before):
        raise UsageError(f"--check {path}: it holds no noise to judge by (speedup_p20): measure it again")
    return before


def _kept(resume: bool, path: Path, device: torch.device) -> Results | None:
    return _read("--resume", path, device, results.SAME_CODE) if resume and path.exists() else None


def _read(option: str, path: Path, device: torch.device, same: Sequence[str]) -> Results:
    """Return the results in a file, if they are comparable with this machine in the fields ``same``."""
    try:
        read = Results.load(path)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
    reason = results.why_incomparable(machine.describe(device), read.machine, same)
    if reason is not None:
        raise UsageError(f"{option} {path}: {reason}")
    return read
