"""Records as a table of at most 100 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch

from benchmarks import host
from benchmarks.results import HostTime, Record, Results
from benchmarks.shapes import Case
from benchmarks.workload import gradient_bytes

HEADER = (
    f"{'implementation':<24} {'p50':>9} {'p20-p80':>15} {'bound':>6} {'speed-up':>8} {'p20-p80':>11}"
    f" {'error':>8}"
)
EXPLANATION = (
    "p50, p20-p80: time of one call. bound: share of the speed at which this machine moves the bytes\n"
    "that have to move (what fits in cache may exceed 100 %). speed-up: over torch.nn.utils, median of\n"
    "interleaved pairs, and their p20-p80. error: largest relative error against float64, beyond one\n"
    "rounding."
)


def case_title(case: Case, dtype: str, device: torch.device) -> str:
    """Return the line above the rows of one case and dtype."""
    return _title(case.name, dtype, device.type, case.tensors, case.numel, gradient_bytes(case, dtype))


def _title(case: str, dtype: str, device: str, tensors: int, numel: int, size: int) -> str:
    amount = f"{tensors} tensors, {numel / 1e6:.4g} M elements, {size / 1e6:.4g} MB"
    return f"{case}, {dtype}, {device}: {amount}"


def every_row(results: Results) -> Iterator[str]:
    """Yield the lines of the table with all records and host times of a file."""
    yield HEADER
    for _, of_case in groupby(results.records, key=lambda r: (r.case, r.dtype)):
        records = list(of_case)
        first = records[0]
        yield ""
        yield _title(first.case, first.dtype, first.device, first.tensors, first.numel, first.bytes)
        for _, of_operation in groupby(records, key=lambda r: (r.op, r.state)):
            yield from rows(list(of_operation))
    yield from ("", EXPLANATION)
    if results.host:
        yield from ("", *host_rows(results.host))


def rows(records: Sequence[Record]) -> list[str]:
    """Return the rows of one operation; what failed the gate gets its error and no speed-up."""
    lines = [f"{records[0].op}:{records[0].state}"]
    for record in records:
        times = "-" if record.p20_us is None else f"{_time(record.p20_us)}-{_time(record.p80_us)}"
        low, high = record.speedup_p20, record.speedup_p80
        speedups = "-" if low is None or high is None else f"{low:.2f}-{high:.2f}"
        lines.append(
            f"  {record.impl:<22} {_time(record.p50_us):>9} {times:>15} {_share(record.pct_of_bound):>6}"
            f" {_cell(record.speedup_vs_torch, '{:.2f}x'):>8} {speedups:>11}"
            f" {_cell(record.max_rel_error, '{:.1e}'):>8}"
        )
        if record.problem is not None:
            lines.append(f"{'':<25}NOT OK: {record.problem}"[:100])
    return lines


def host_rows(times: Sequence[HostTime]) -> list[str]:
    """Return the table of host times, one row per implementation."""
    counts = list(dict.fromkeys(t.tensors for t in times))
    costs = host.costs(times)
    lines = [
        "host time of clip_grad_norm_, warm, for a number of one-element tensors",
        f"{'':<24}" + "".join(f"{count:>10,}" for count in counts) + f"{'each further':>16}",
    ]
    for impl in dict.fromkeys(t.impl for t in times):
        cells = "".join(f"{_time(t.p50_us):>10}" for t in times if t.impl == impl)
        further = f"{costs[impl].us_per_further:.3f} us" if impl in costs else "-"
        lines.append(f"{impl:<24}{cells}{further:>16}")
    return lines


def _time(us: float | None) -> str:
    if us is None:
        return "-"
    value, unit = (us, "us") if us < 1e3 else (us / 1e3, "ms") if us < 1e6 else (us / 1e6, "s")
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def _share(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
