"""Records as a table of at most 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks import host
from benchmarks.results import HostTime, Record
from benchmarks.shapes import Case
from benchmarks.workload import gradient_bytes

HEADER = (
    f"{'operation':<16} {'state':<9} {'implementation':<22} {'p50':>9} {'p20-p80':>15}"
    f" {'bound':>6} {'speed-up':>8} {'error':>8}"
)
EXPLANATION = (
    "p50, p20-p80: time of one call. bound: share of the speed at which this machine moves the bytes\n"
    "that have to move (what fits in cache may exceed 100 %). speed-up: over torch.nn.utils, median of\n"
    "interleaved pairs. error: largest relative error against float64, beyond one rounding."
)


def case_title(case: Case, dtype: str, device: torch.device) -> str:
    """Return the line above the rows of one case and dtype."""
    size = gradient_bytes(case, dtype)
    amount = f"{case.tensors} tensors, {case.numel / 1e6:.4g} M elements, {size / 1e6:.4g} MB"
    return f"{case.name}, {dtype}, {device.type}: {amount}"


def rows(records: Sequence[Record]) -> list[str]:
    """Return the rows of one operation; what failed the gate gets its error and no speed-up."""
    lines = []
    for index, record in enumerate(records):
        op, state = (record.op, record.state) if index == 0 else ("", "")
        spread = "-" if record.p20_us is None else f"{_time(record.p20_us)}-{_time(record.p80_us)}"
        lines.append(
            f"{op:<16} {state:<9} {record.impl:<22} {_time(record.p50_us):>9} {spread:>15}"
            f" {_share(record.pct_of_bound):>6} {_cell(record.speedup_vs_torch, '{:.2f}x'):>8}"
            f" {_cell(record.max_rel_error, '{:.1e}'):>8}"
        )
        if record.problem is not None:
            lines.append(f"{'':<27}NOT OK: {record.problem}"[:100])
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
