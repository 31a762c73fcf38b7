"""``python -m benchmarks.gpu_design``: eight measurements of a GPU that decide how the CUDA kernels work.

Most run gpu_probes.cu, built with nvcc on first use: the package's kernels and simpler ones, with parameters
that are constants in the package. 2, 6 and 7 run torch and the package. Every figure is printed beside the
prediction that was made before any measurement; where they differ, the design has to be explained or changed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import contenders, machine, measure
from benchmarks.cases import CASES, Workload
from benchmarks.contenders import BASELINE, LOOP
from benchmarks.gpu_probes import (
    LARGE,
    MAX_BLOCKS,
    SMALL,
    TABLES,
    TILE,
    USUAL_BLOCKS,
    Listed,
    Probes,
    alone,
    build,
)
from benchmarks.machine import Call
from benchmarks.operations import OPERATIONS
from benchmarks.plan import OUT, command_line

_MB, _GIB = 10**6, 1 << 30
_LOADS, _BLOCKS_PER_SM = (2, 4, 8, 16), (1, 2, 4, 8, MAX_BLOCKS)
_REPEATS = 15
_NOTHING_EXCEEDS = 1e30

_EXAMPLES = """examples:
  python -m benchmarks.gpu_design
  python -m benchmarks.gpu_design --only 3 4     two of them, in seconds
  python -m benchmarks.gpu_design --build        compile the probes only, for a machine without nvcc
"""


@dataclass(frozen=True)
class Finding:
    """One figure.

    Args:
        measurement: its number, 1 to 8.
        what: what was measured.
        value: None if it could not be; then ``unit`` says why.
        unit: of the value.
        predicted: before it was measured; empty if nothing was.
        shown: whether the table has it; the file has all.
    """

    measurement: int
    what: str
    value: float | None
    unit: str
    predicted: str = ""
    shown: bool = True


class Bench:
    """Median device times with a cold L2.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sweep = torch.zeros(3 * machine.cache_bytes(device) // 4, device=device)

    def us(self, call: Call) -> float:
        """Return the median time of a call, its launches all queued before the first one runs."""
        machine.host_us(call)  # warms up
        clock = machine.device_clock(self.device, machine.host_us(call))
        times = []
        for _ in range(_REPEATS):
            self._sweep.sum()  # read, not written: what is written back later delays what is timed
            times.append(clock(call))
        return statistics.median(times)

    def buffer(self, size: int) -> Tensor:
        """Return float32 ones of about that many bytes."""
        return torch.ones(max(1, size // TILE) * TILE // 4, device=self.device)


def bandwidth(bench: Bench) -> Iterator[Finding]:
    """1: read-only and in-place bandwidth against loads in flight and blocks per SM."""
    probes = Probes(bench.device)
    coef = torch.full((1,), 0.999, device=bench.device)
    predictions = {"1 GiB": ("4.31, as CUB's reduce", "4.3, as a copy")}
    for size, name in ((64 * _MB, "64 MB"), (_GIB, "1 GiB"), (16 * 10**9, "16 GB")):
        if size > torch.cuda.mem_get_info(bench.device)[0] - _GIB:
            yield Finding(1, f"bandwidth at {name}", None, "not enough memory")
            continue
        x = bench.buffer(size)
        moved = x.numel() * x.itemsize
        read, in_place = {}, {}
        for loads, blocks in product(_LOADS, _BLOCKS_PER_SM):
            where = f"{loads} loads in flight, {blocks} blocks/SM"
            read[where] = moved / bench.us(partial(probes.read, x, loads, blocks)) / 1e6
            in_place[where] = 2 * moved / bench.us(partial(probes.update, x, coef, loads, blocks)) / 1e6
        predicted = predictions.get(name, ("", ""))
        for what, found, guess in zip(("read", "in place"), (read, in_place), predicted):
            best = max(found, key=lambda where: found[where])
            yield Finding(1, f"{what} {name}, best: {best}", found[best], "TB/s", guess)
            for where, value in found.items():
                yield Finding(1, f"{what} {name}, {where}", value, "TB/s", shown=False)


def foreach_norm(bench: Bench) -> Iterator[Finding]:
    """2: what torch's own _foreach_norm reads at."""
    for dtype in (torch.float32, torch.bfloat16):
        numel = (16 << 20) // dtype.itemsize
        tensors = [torch.ones(numel, dtype=dtype, device=bench.device) for _ in range(64)]
        speed = _GIB / bench.us(partial(torch._foreach_norm, tensors)) / 1e6
        yield Finding(2, f"_foreach_norm, 64 x 16 MiB of {dtype}", speed, "TB/s", "below the read bound")


def early_exit(bench: Bench) -> Iterator[Finding]:
    """3: what a scale kernel that finds nothing to do adds to the norm kernel before it."""
    probes = Probes(bench.device)
    many = Listed(bench.buffer(LARGE * 256 + TILE), LARGE, 64, 64)
    lists = [
        ("1 MB", alone(bench.buffer(_MB)), SMALL),
        ("64 MB", alone(bench.buffer(64 * _MB)), SMALL),
        ("1 GiB", alone(bench.buffer(_GIB)), SMALL),
        (f"{LARGE:,} tensors", many, LARGE),
        (f"{LARGE:,} chunks", alone(bench.buffer(LARGE * TILE)), LARGE),  # the same grid, and no search
    ]
    for dependent, how in ((False, "plain launch"), (True, "dependent launch")):
        found = {}
        for name, listed, table in lists:
            norm = bench.us(partial(probes.run, "norm", listed, max_norm=_NOTHING_EXCEEDS, table=table))
            both = bench.us(
                partial(probes.clip, listed, max_norm=_NOTHING_EXCEEDS, table=table, dependent=dependent)
            )
            found[name] = both - norm
            yield Finding(3, f"early exit after the norm of {name}, {how}", both - norm, "us")
        search = found[f"{LARGE:,} tensors"] - found[f"{LARGE:,} chunks"]
        predicted = "about 0, before the wait" if dependent else "1.1 to 1.6"
        yield Finding(3, f"of it the search among {LARGE:,} tensors, {how}", search, "us", predicted)


def carry_over(bench: Bench) -> Iterator[Finding]:
    """4: what the scaling finds in L2 of what the norm has read, forward and in reverse."""
    probes = Probes(bench.device)
    coef = torch.full((1,), 0.999, device=bench.device)
    for megabytes in (20, 40, 60, 80, 100, 120):
        x = bench.buffer(megabytes * _MB)
        forward = bench.us(partial(probes.read_then_update, x, coef))
        reverse = bench.us(partial(probes.read_then_update, x, coef, reverse=True))
        predicted = "" if megabytes <= 40 else "above 1"
        what = f"{megabytes} MB read, then scaled: time forward / reverse"
        yield Finding(4, what, forward / reverse, "x", predicted)
        yield Finding(4, f"{megabytes} MB, forward", forward, "us", shown=False)
        yield Finding(4, f"{megabytes} MB, reverse", reverse, "us", shown=False)


def parameters(bench: Bench) -> Iterator[Finding]:
    """5: launches with 4, 8.5 and 32 KB of parameters."""
    probes = Probes(bench.device)
    for table, size in TABLES.items():
        call = partial(probes.parameters, table)
        on_host = statistics.median(machine.host_us(call) for _ in range(10 * _REPEATS))
        yield Finding(5, f"launch with {size} of parameters, on the GPU", bench.us(call), "us")
        yield Finding(5, f"launch with {size} of parameters, on the host, through ctypes", on_host, "us")


def host_time(bench: Bench) -> Iterator[Finding]:
    """6: host time of clip_grad_norm_ at 148, 291 and 6,000 tensors."""
    found, _ = contenders.available(bench.device)
    chosen = [found[name] for name in found if name != LOOP]
    for times in measure.host_times(chosen, bench.device, rounds=10, counts=(148, 291, 6000)):
        for time in times:
            torchs = f"{2.1 * time.tensors:.0f}, 2.1 per tensor"
            ours = "under 20" if time.tensors <= 300 else f"under {20 + 0.1 * (time.tensors - 300):.0f}"
            predicted = torchs if time.impl == BASELINE else ours
            yield Finding(6, f"{time.impl}, {time.tensors:,} tensors", time.p50_us, "us", predicted)


def graph_replay(bench: Bench) -> Iterator[Finding]:
    """7: clip_grad_norm_ of GPT-2 in bfloat16, replayed from a CUDA graph and called."""
    found, _ = contenders.available(bench.device)
    operation = next(o for o in OPERATIONS if o.label == "clip_grad_norm_:clipped")
    workload = Workload(CASES["gpt2-124m"], "bfloat16", bench.device, machine.cache_bytes(bench.device))
    parameters = workload.next()
    for name, implementation in found.items():
        if name == LOOP or operation.function not in implementation.functions:
            continue
        call = operation.bind(implementation.functions[operation.function], parameters, workload.norm)
        try:
            replay, norm = _captured(call)
            workload.restore(parameters)
            replay()
            error = abs(float(norm) - workload.norm) / workload.norm
        except Exception as problem:  # that a call cannot be captured is a finding, too
            yield Finding(
                7, f"{name}, replay", None, f"{type(problem).__name__}: {problem}".partition("\n")[0]
            )
            continue
        yield Finding(7, f"{name}, error of the replayed norm", error, "relative", "as when called")
        yield Finding(7, f"{name}, called", bench.us(call), "us")
        yield Finding(7, f"{name}, replayed", bench.us(replay), "us", "not above the call")


def kernels(bench: Bench) -> Iterator[Finding]:
    """8: the package's kernels: blocks per multiprocessor, ragged tiles, boundaries between launches."""
    probes = Probes(bench.device)
    for size, name in ((_GIB, "1 GiB"), (16 * 10**9, "16 GB")):
        if size > torch.cuda.mem_get_info(bench.device)[0] - _GIB:
            yield Finding(8, f"kernels on {name}", None, "not enough memory")
            continue
        listed = alone(bench.buffer(size))
        moved = listed.buffer.numel() * listed.buffer.itemsize
        for operation, times_moved in (("norm", 1), ("scale", 2), ("clamp", 1)):
            for blocks in (4, 8, MAX_BLOCKS):
                predicted = "2 to 4 % over 4 blocks" if size > _GIB and blocks > 4 else ""
                took = _kernel_us(bench, probes, operation, listed, blocks=blocks)
                what = f"{operation} {name}, {blocks} blocks/SM"
                yield Finding(8, what, times_moved * moved / took / 1e6, "TB/s", predicted)
        del listed
    yield from _ragged_tiles(bench, probes)
    yield from _boundaries(bench, probes)


def _ragged_tiles(bench: Bench, probes: Probes) -> Iterator[Finding]:
    """Measure what one element less, and a shift by one, cost tensors of a chunk, two a multiprocessor."""
    numel, tensors = TILE // 2, 2 * probes.processors
    x = bench.buffer((tensors + 1) * TILE).view(torch.bfloat16)
    lists = {
        "whole": Listed(x, tensors, numel, numel),
        "ragged": Listed(x, tensors, numel - 1, numel),
        "misaligned": Listed(x[1:], tensors, numel - 1, numel),
    }
    # What reading the last tile by elements took.
    predictions = {"norm": "below 5 to 8", "scale": "below 6 to 11"}
    for operation, predicted in predictions.items():
        took = {name: _kernel_us(bench, probes, operation, listed) for name, listed in lists.items()}
        for name, guess in (("ragged", predicted), ("misaligned", "")):
            yield Finding(
                8, f"{operation}, {name} tensors less whole", took[name] - took["whole"], "us", guess
            )


def _boundaries(bench: Bench, probes: Probes) -> Iterator[Finding]:
    """Measure what one more launch costs a list of tiny tensors."""
    launches = LARGE // SMALL
    tensors = launches * SMALL
    listed = Listed(bench.buffer(tensors * 256 + TILE), tensors, 64, 64)
    for operation, dependent in product(("norm", "scale", "clamp"), (False, True)):
        one, many = (
            _kernel_us(bench, probes, operation, listed, table=table, dependent=dependent)
            for table in (LARGE, SMALL)
        )
        how, predicted = ("dependent", "below a plain one") if dependent else ("plain", "about 4")
        what = f"{operation}, boundary between {how} launches"
        yield Finding(8, what, (many - one) / (launches - 1), "us", predicted)


def _kernel_us(
    bench: Bench,
    probes: Probes,
    operation: str,
    listed: Listed,
    *,
    table: int = LARGE,
    blocks: int = USUAL_BLOCKS,
    dependent: bool = True,
) -> float:
    """Return the time of one of the package's kernels; scaling multiplies, and clamping changes nothing."""
    probes.results.fill_(0.999)
    given = partial(probes.run, operation, listed, max_norm=_NOTHING_EXCEEDS, table=table)
    return bench.us(partial(given, blocks=blocks, dependent=dependent))


def _captured(call: Callable[[], Tensor]) -> tuple[Call, Tensor]:
    """Return what replays the call, and the tensor its result appears in."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate on their first call, which a capture forbids
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


MEASUREMENTS: dict[int, Callable[[Bench], Iterator[Finding]]] = {
    1: bandwidth, 2: foreach_norm, 3: early_exit, 4: carry_over, 5: parameters, 6: host_time, 7: graph_replay,
    8: kernels,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, save after each measurement, print the table last; return the exit status."""
    arguments = _parse(argv)
    if arguments.build:
        print(os.path.relpath(build()))
        return 0
    if not torch.cuda.is_available():
        print(
            "python -m benchmarks.gpu_design: no GPU was found, and nothing else is measured", file=sys.stderr
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    path = arguments.json or OUT / f"design-{machine.file_name(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(device)
    findings: list[Finding] = []
    for number in arguments.only or MEASUREMENTS:
        measurement = MEASUREMENTS[number]
        print(measurement.__doc__, flush=True)
        try:
            findings += measurement(bench)
        except Exception as error:  # the other measurements are still useful
            findings.append(Finding(number, "failed", None, f"{type(error).__name__}: {error}"))
        block = {"machine": machine.describe(device), "findings": [asdict(f) for f in findings]}
        path.write_text(json.dumps(block, indent=1) + "\n")
        torch.cuda.empty_cache()
    print("\n" + "\n".join(table(findings)))
    print(f"\nresults  {os.path.relpath(path)}")
    return 1 if any(f.what == "failed" for f in findings) else 0


def table(findings: Sequence[Finding]) -> list[str]:
    """Return the table of the figures to show, each beside its prediction."""
    lines = [f"{'':<2} {'':<62} {'measured':>13}  predicted"]
    for f in findings:
        if f.shown:
            value = f.unit if f.value is None else f"{f.value:.3g} {f.unit}"
            lines.append(f"{f.measurement:<2} {f.what:<62} {value:>13}  {f.predicted}".rstrip())
    return lines


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    measurements = "\nmeasurements:\n" + "\n".join(f"  {m.__doc__}" for m in MEASUREMENTS.values())
    parser = command_line("benchmarks.gpu_design", __doc__, _EXAMPLES + measurements)
    add = parser.add_argument
    add(
        "--only",
        type=int,
        nargs="+",
        choices=MEASUREMENTS,
        metavar="N",
        help="these measurements. Default: all",
    )
    add("--build", action="store_true", help="compile the probes and stop")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="default: benchmarks/out/design-<device>-torch<version>.json",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
