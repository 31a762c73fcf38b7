"""``python -m benchmarks``: torch.nn.utils against every gradclip_ext backend on this machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import implementations, machine, plot, suite, table, workload
from benchmarks.implementations import BASELINE, Implementation
from benchmarks.operations import OPERATIONS, Operation
from benchmarks.options import positive
from benchmarks.progress import Progress
from benchmarks.shapes import CASES, DEFAULT_CASES, Case
from benchmarks.suite import Record, Settings

OUT = Path(__file__).parent / "out"
# Seconds for one operation on one case, and dtypes, in a full run and in a quick one.
_SECONDS, _QUICK_SECONDS = 3.0, 0.5
_DTYPES, _QUICK_DTYPES = ["float32", "bfloat16"], ["float32"]

_EXAMPLES = """examples:
  python -m benchmarks                              the default cases on the GPU, or on the CPU without one
  python -m benchmarks --quick                      the same in under a minute: float32, fewer repeats
  python -m benchmarks --list                       what --cases, --ops and --impls accept here
  python -m benchmarks --cases resnet-50 vit-b-16 --dtypes float32 float16
  python -m benchmarks --cases all --ops get_total_norm clip_grad_norm_:clipped
  python -m benchmarks --impls foreach loop --device cpu --repeats 30

Every implementation is compared with float64 before it is timed: one that is wrong is shown
with its error and without a speed-up. Send us the JSON file if your machine is not among the
results; it names the hardware and the versions, no path, user or host.
"""


class Unusable(Exception):
    """What was asked for cannot be measured here; the message says why and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks and return the exit status.

    0: measured. 1: a gradclip_ext backend was wrong, or nothing could be measured. 2: the
    command line asks for something that does not exist here. 130: interrupted; what was
    measured until then is printed and saved.
    """
    arguments = _parse(argv)
    try:
        device = _device(arguments.device)
        found, missing = implementations.available(device)
        if arguments.list:
            _print_choices(found, missing)
            return 0
        cases = [CASES[name] for name in _chosen("case", arguments.cases, list(CASES))]
        dtypes = arguments.dtypes or (_QUICK_DTYPES if arguments.quick else _DTYPES)
        dtypes = _chosen("dtype", dtypes, list(workload.DTYPES))
        operations = _operations(arguments.ops)
        chosen = _implementations(arguments.impls, found, missing)
        path = _results_path(arguments.json, device)
    except Unusable as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2

    for name, reason in missing.items():
        print(f"{name} is not measured: {reason}")
    meter = machine.BandwidthMeter(device)
    fitting = [(case, dtype) for case in cases for dtype in dtypes if _fits(case, dtype, device)]
    if not fitting:
        print("Nothing was measured: no case fits into memory.", file=sys.stderr)
        return 1
    _print_machine(machine.describe(device, None))
    records: list[Record] = []
    interrupted = False
    try:
        seconds = _QUICK_SECONDS if arguments.quick else _SECONDS
        settings = Settings(device, meter.measure, arguments.repeats, seconds)
        for record in _measure(fitting, operations, chosen, settings):
            records.append(record)
    except KeyboardInterrupt:
        interrupted = True
        kept = f"the {len(records)} rows measured so far are kept" if records else "nothing was measured yet"
        print(f"\nInterrupted: {kept}.")
    if records:
        records = [suite.with_bound(record, meter.best) for record in records]
        _save(machine.describe(device, meter.best), records, path)
    if interrupted:
        return 130
    ours_wrong = any(not r.ok for r in records if not found[r.impl].peer)
    return 1 if ours_wrong or not records else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure torch.nn.utils against every gradclip_ext backend on this machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="float32, fewer repeats: under a minute on two idle cores")
    add("--list", action="store_true", help="print what can be measured here, and stop")
    note = f"shape lists; all for all. Default: {' '.join(DEFAULT_CASES)}"
    add("--cases", nargs="+", metavar="NAME", default=DEFAULT_CASES, help=note)
    note = f"of the gradients; all for all. Default: {' '.join(_DTYPES)}"
    add("--dtypes", nargs="+", metavar="NAME", help=note)
    add(
        "--ops",
        nargs="+",
        metavar="NAME",
        default=["all"],
        help="operation, or operation:state. Default: all",
    )
    note = "torch, loop or a backend; torch is always measured along. Default: all but loop"
    add("--impls", nargs="+", metavar="NAME", help=note)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<index>. Default: auto")
    add("--repeats", type=positive, metavar="N", help="calls of each. Default: what a few seconds allow")
    add("--json", type=Path, metavar="FILE", help="default: benchmarks/out/<device>-torch<version>.json")
    return parser.parse_args(argv)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Unusable(f"there is no device {name!r}: use auto, cpu, cuda or cuda:<index>") from None
    if device.type not in ("cpu", "cuda"):
        raise Unusable(f"--device {name}: only cpu and cuda are measured so far")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise Unusable(
                f"--device {name}: no GPU was found. Is this a CUDA build of torch (here: "
                f"{torch.__version__})? Use --device cpu to measure the CPU"
            )
        count, index = torch.cuda.device_count(), device.index or 0
        if index >= count:
            raise Unusable(f"--device {name}: there are {count} GPUs, the last one is cuda:{count - 1}")
        torch.cuda.set_device(index)
        device = torch.device("cuda", index)
    return device


def _chosen(kind: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the named ones in the order of ``known``, each once."""
    wanted = set(known) if "all" in names else set(names)
    unknown = wanted - set(known)
    if unknown:
        raise Unusable(f"unknown {kind} {', '.join(sorted(unknown))}; there are: {', '.join(known)}, all")
    return [name for name in known if name in wanted]


def _operations(names: Sequence[str]) -> list[Operation]:
    by_label = {operation.label: operation for operation in OPERATIONS}
    labels = []
    for name in names:
        labels += [label for label in by_label if label.split(":")[0] == name] or [name]
    return [by_label[label] for label in _chosen("operation", labels, list(by_label))]


def _implementations(
    names: Sequence[str] | None, found: dict[str, Implementation], missing: dict[str, str]
) -> list[Implementation]:
    """Return the chosen implementations; torch.nn.utils always, because ratios need it."""
    if names is None:
        return [found[name] for name in implementations.default_names(list(found))]
    full = [implementations.full_name(name) for name in names]
    for name in full:
        if name in missing:
            raise Unusable(f"{name} cannot be measured here: {missing[name]}")
    return [found[name] for name in _chosen("implementation", [BASELINE, *full], list(found))]


def _results_path(path: Path | None, device: torch.device) -> Path:
    """Return where the results go, having looked now, not after the work, whether they can go there."""
    path = path or OUT / f"{machine.file_name(device)}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unusable(f"--json {path} cannot be written: {error.strerror}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Unusable(f"--json {path} cannot be written: it is a folder, or write-protected")
    return path


def _fits(case: Case, dtype: str, device: torch.device) -> bool:
    """Tell whether there is memory for the case; print why it is skipped if not."""
    needed = workload.needed_bytes(case, dtype, machine.cache_bytes(device))
    free = machine.free_bytes(device)
    if free is None or needed <= free:
        return True
    print(f"{case.name} in {dtype} is skipped: it needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free.")
    return False


def _measure(
    fitting: Sequence[tuple[Case, str]],
    operations: Sequence[Operation],
    chosen: Sequence[Implementation],
    settings: Settings,
) -> Iterator[Record]:
    """Measure and print case by case; every record is yielded at once, so that Ctrl-C loses little."""
    # A fixed part for the repeats and one that grows with the bytes: good enough to foresee the end.
    weights = [1.0 + case.numel * workload.DTYPES[dtype].itemsize / 200e6 for case, dtype in fitting]
    with Progress(sum(weights) * len(operations)) as progress:
        progress.write(f"\n{table.HEADER}")
        for (case, dtype), weight in zip(fitting, weights):
            progress.label(f"{case.name} {dtype}")
            progress.write(f"\n{table.case_title(case, dtype, settings.device)}")
            try:
                for outcome in suite.measure_case(case, dtype, operations, chosen, settings):
                    yield from outcome.records
                    progress.write("\n".join(table.rows(outcome.records, outcome.problems)))
                    progress.advance(weight)
            except torch.OutOfMemoryError:
                progress.write("Out of memory: the rest of this case is skipped.")
    print(f"\n{table.EXPLANATION}")


def _save(block: dict[str, Any], records: Sequence[Record], path: Path) -> None:
    path.write_text(json.dumps({"machine": block, "records": [asdict(r) for r in records]}, indent=1) + "\n")
    print(
        f"\nmemory   reads {block['read_gbps']:.1f} GB/s, reads and writes {block['inplace_gbps']:.1f} GB/s: "
        "the best of the run,\n         which the bounds in the file are made from"
    )
    print(f"results  {os.path.relpath(path)}")
    picture = path.with_suffix(".png")
    if plot.speedups(block, records, picture):
        print(f"plot     {os.path.relpath(picture)}")
    elif not plot.available():
        print("plot     none: matplotlib is not installed (pip install matplotlib)")


def _print_machine(block: dict[str, Any]) -> None:
    print(f"cpu      {block['cpu']}, {block['cores']} cores")
    if block["gpu"]:
        print(f"gpu      {block['gpu']}, driver {block['driver']}, CUDA {block['cuda']}")
    ours = f"gradclip_ext {block['gradclip_ext']} at {block['commit'] or 'no commit'}"
    print(f"torch    {block['torch']}, {ours}")
    load = machine.load()
    if load > block["cores"]:
        print(f"busy     load {load:.1f} on {block['cores']} cores: times, and even ratios, will be unsteady")


def _print_choices(found: dict[str, Implementation], missing: dict[str, str]) -> None:
    print("cases")
    for case in CASES.values():
        print(f"  {case.name:<16} {case.tensors:>5} tensors {case.numel / 1e6:>7.1f} M  {case.source}")
    print(f"dtypes\n  {', '.join(workload.DTYPES)}")
    print("operations")
    for operation in OPERATIONS:
        print(f"  {operation.label}")
    print("implementations")
    for name in found:
        print(f"  {name}")
    for name, reason in missing.items():
        print(f"  {name}: not here, {reason}")


if __name__ == "__main__":
    sys.exit(main())
