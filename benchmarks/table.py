"""Records as a table of at most 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from benchmarks.shapes import Case
from benchmarks.suite import Record
from benchmarks.workload import DTYPES

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
    size = case.numel * DTYPES[dtype].itemsize
    amount = f"{case.tensors} tensors, {case.numel / 1e6:.4g} M elements, {size / 1e6:.4g} MB"
    return f"{case.name}, {dtype}, {device.type}: {amount}"


def rows(records: Sequence[Record], problems: Mapping[str, str]) -> list[str]:
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
        if record.impl in problems:
            lines.append(f"{'':<27}WRONG: {problems[record.impl]}"[:100])
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
