"""``python -m benchmarks``: torch.nn.utils against every gradclip_ext backend on this machine."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, measure, plot, results, terminal
from benchmarks.cases import CASES, DTYPES, Case, gradient_bytes
from benchmarks.contenders import is_ours
from benchmarks.machine import BandwidthMeter
from benchmarks.measure import Settings
from benchmarks.operations import OPERATIONS, Operation
from benchmarks.plan import Plan, UsageError, Work, parse, plan
from benchmarks.results import Record, Results, Skipped
from benchmarks.terminal import Progress

# For the progress bar: host times take about as long as one operation on 800 MB of gradients.
_HOST_WEIGHT = 5.0
# How many times --check measures again what looks worse.
_CONFIRMATIONS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks and return the exit status.

    0: measured. 1: a gradclip_ext backend was wrong, or slower than --check allows, or nothing
    could be measured. 2: the command line asks for something that does not exist here. 130:
    interrupted; what was measured until then is printed and saved.
    """
    arguments = parse(argv)
    try:
        chosen = plan(arguments)
    except UsageError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        _print_choices(chosen)
        return 0
    _print_absent(chosen)
    if not chosen.work:
        print("Nothing was measured: no case can be.", file=sys.stderr)
        return 1
    run = Run(chosen)
    interrupted = False
    try:
        run.measure()
    except KeyboardInterrupt:
        interrupted = True
        kept = len(run.results.records)
        message = f"the {kept} rows measured so far are kept" if kept else "nothing was measured yet"
        print(f"\nInterrupted: {message}; --resume goes on from there.")
    records = run.results.records
    if records:
        run.save()
        _print_outcome(run.results, chosen.path)
    if interrupted:
        return 130
    ours_wrong = any(not r.ok for r in records if is_ours(r.impl))
    slower = chosen.before is not None and _print_check(run, chosen.before)
    return 1 if ours_wrong or slower or not records else 0


class Run:
    """Carries out a plan.

    Args:
        chosen: the plan.
    """

    def __init__(self, chosen: Plan) -> None:
        self._plan = chosen
        self._meter = BandwidthMeter(chosen.device)
        block = machine.describe(chosen.device)
        block["peers"] = {
            i.name: {"version": i.version, "note": i.note} for i in chosen.found.values() if i.version
        }
        kept = chosen.kept or Results(block)
        block |= {key: kept.machine[key] for key in ("read_gbps", "inplace_gbps")}
        self.results = Results(block, list(kept.records), list(kept.host), chosen.skipped)
        _print_machine(block)

    def measure(self) -> None:
        """Measure and print case by case, and save after each."""
        done = {r.key[:4] for r in self.results.records}
        left = self._work(lambda key: key not in done)
        # A fixed part for the repeats and one that grows with the bytes: a good enough estimate of the time.
        weights = {pair: 1.0 + gradient_bytes(*pair) / 200e6 for pair in left}
        total = sum(weights[pair] * len(operations) for pair, operations in left.items())
        with Progress(total + (0.0 if self.results.host else _HOST_WEIGHT)) as progress:
            if not self.results.host:
                self._measure_host(progress)
                progress.advance(_HOST_WEIGHT)
            progress.write(f"\n{terminal.HEADER}")
            for pair, operations in left.items():
                self._measure_pair(pair, operations, weights[pair], progress)
                self.save()
        print(f"\n{terminal.EXPLANATION}")

    def _work(self, wanted: Callable[[tuple[str, str, str, str]], bool]) -> Work:
        """Return the part of the plan whose case, dtype, operation and state are wanted."""
        work = {
            (case, dtype): [o for o in operations if wanted((case.name, dtype, o.name, o.state))]
            for (case, dtype), operations in self._plan.work.items()
        }
        return {pair: operations for pair, operations in work.items() if operations}

    def _measure_pair(
        self, pair: tuple[Case, str], operations: Sequence[Operation], weight: float, progress: Progress
    ) -> None:
        case, dtype = pair
        progress.label(f"{case.name} {dtype}")
        progress.write(f"\n{terminal.case_title(case, dtype, self._plan.device)}")
        try:
            for records in self._records(case, dtype, operations):
                self.results.records += records
                progress.write("\n".join(terminal.rows(records)))
                progress.advance(weight)
        except torch.OutOfMemoryError:
            progress.write("Out of memory: the rest of this case is skipped.")
            self.results.skipped.append(Skipped(case.name, dtype, "out of memory"))

    def _records(self, case: Case, dtype: str, operations: Sequence[Operation]) -> Iterator[list[Record]]:
        plan = self._plan
        settings = Settings(plan.device, self._meter.measure, plan.repeats, plan.extent.seconds)
        return measure.measure_case(case, dtype, operations, plan.chosen, settings)

    def regressions(self, before: Results) -> list[str]:
        """Return a sentence for every record that is worse than ``before``, each time it is measured."""
        found = results.regressions(self.results.records, before)
        for _ in range(_CONFIRMATIONS):
            if found:
                print(f"\n{len(found)} rows look worse than before and are measured again", flush=True)
            again = results.regressions(self._again({key[:4] for key in found}), before)
            found = {key: again[key] for key in found if key in again}
        return list(found.values())

    def _again(self, keys: set[tuple[str, str, str, str]]) -> Iterator[Record]:
        for (case, dtype), operations in self._work(keys.__contains__).items():
            for records in self._records(case, dtype, operations):
                yield from records

    def save(self) -> None:
        """Write the file."""
        median = self._meter.median()
        if median is not None:
            self.results.machine |= median.rounded()
        self.results.save(self._plan.path)

    def _measure_host(self, progress: Progress) -> None:
        progress.label("host time")
        plan = self._plan
        measured = measure.host_times(plan.chosen, plan.device, plan.extent.host_rounds)
        self.results.host = [time for times in measured for time in times]
        progress.write("\n" + "\n".join(terminal.host_rows(self.results.host)))


def _print_outcome(measured: Results, path: Path) -> None:
    block = measured.machine
    print(
        f"\nmemory   reads {block['read_gbps']:.1f} GB/s, reads and writes {block['inplace_gbps']:.1f} GB/s: "
        "the median of the run;\n         a bound is made from what was measured right before"
    )
    print(f"results  {os.path.relpath(path)}")
    if not plot.available():
        print("plots    none: matplotlib is not installed (pip install matplotlib)")
        return
    for picture in plot.draw_all(measured, path):
        print(f"plot     {os.path.relpath(picture)}")


def _print_check(run: Run, before: Results) -> bool:
    """Print what became slower or wrong since ``before``; return whether anything did."""
    problems = run.regressions(before)
    for problem in problems:
        print(f"SLOWER OR WRONG: {problem}", file=sys.stderr)
    count = results.compared(run.results, before)
    print(f"check    {count} rows compared, {len(problems)} worse than their noise allows")
    return bool(problems)


def _print_absent(chosen: Plan) -> None:
    for name, reason in chosen.missing.items():
        print(f"{name} is not measured: {reason}")
    for skipped in chosen.skipped:
        print(f"{skipped.case} in {skipped.dtype} is skipped: {skipped.reason}.")


def _print_machine(block: dict[str, Any]) -> None:
    print(f"cpu      {block['cpu']}, {block['cores']} cores")
    if block["gpu"]:
        print(f"gpu      {block['gpu']}, driver {block['driver']}, CUDA {block['cuda']}")
    ours = f"gradclip_ext {block['gradclip_ext']} at {block['commit'] or 'no commit'}"
    print(f"torch    {block['torch']}, {ours}")
    for name, peer in block["peers"].items():
        print(f"peer     {name} {peer['version']}: {peer['note']}")
    load = machine.load()
    if load > block["cores"]:
        print(f"busy     load {load:.1f} on {block['cores']} cores: times, and even ratios, will be unsteady")


def _print_choices(chosen: Plan) -> None:
    print("cases")
    for case in CASES.values():
        print(f"  {case.name:<16} {case.tensors:>5} tensors {case.numel / 1e6:>7.1f} M  {case.source}")
    print(f"dtypes\n  {', '.join(DTYPES)}")
    print("operations")
    for operation in OPERATIONS:
        print(f"  {operation.label}")
    print("implementations")
    for name, implementation in chosen.found.items():
        version = f" {implementation.version}" if implementation.version else ""
        print(f"  {name}{version}{': ' if implementation.note else ''}{implementation.note}")
    for name, reason in chosen.missing.items():
        print(f"  {name}: not here, {reason}")


if __name__ == "__main__":
    # A job manager ends a run with SIGTERM: handled as Ctrl-C, so that the plots are drawn, too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
