"""What a run prints: the progress bar, the table in the terminal, and the formats of its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from types import TracebackType

import torch

from benchmarks.cases import Case, gradient_bytes
from benchmarks.results import HostTime, Record, Results, host_costs

try:
    from tqdm import tqdm
except ImportError:  # measuring needs torch alone, so that it runs on any machine as it is
    tqdm = None

# ---------------------------------------------------------------- progress bar


class Progress:
    """A bar with the time left, on stderr if that is a terminal, so that stdout holds results only.

    Args:
        total: amount of work, in any unit that is roughly proportional to time.
    """

    def __init__(self, total: float) -> None:
        self._bar = tqdm and tqdm(
            total=total,
            bar_format="{desc} {percentage:3.0f}% |{bar:30}| {elapsed} elapsed, {remaining} left",
            disable=None,  # that is: unless stderr is a terminal
            leave=False,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def label(self, text: str) -> None:
        """Say what is being worked on."""
        if self._bar is not None:
            self._bar.set_description_str(text)

    def advance(self, amount: float) -> None:
        """Count work as done."""
        if self._bar is not None:
            self._bar.update(amount)

    def write(self, text: str) -> None:
        """Print a result above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)


# ---------------------------------------------------------------- table

HEADER = (
    f"{'implementation':<24} {'p50':>9} {'p20-p80':>15} {'bound':>7} {'speed-up':>8} {'p20-p80':>13}"
    f" {'error':>8}"
)
EXPLANATION = (
    "p50, p20-p80: time of one call. bound: share of the measured memory bandwidth, counting only\n"
    "bytes that have to be read or written (what fits in cache may exceed 100 %).\n"
    "speed-up: over torch.nn.utils, median of interleaved pairs, and their p20-p80. error: largest\n"
    "relative error against float64, beyond one rounding."
)


def case_title(case: Case, dtype: str, device: torch.device) -> str:
    """Return the line above the rows of one case and dtype."""
    megabytes = gradient_bytes(case, dtype) / 1e6
    size = f"{case.tensors} tensors, {case.numel / 1e6:.4g} M elements, {megabytes:.4g} MB"
    return f"{case.name}, {dtype}, {device.type}: {size}"


def every_row(results: Results) -> Iterator[str]:
    """Yield the lines of the table with all records and host times of a file."""
    yield HEADER
    for _, of_case in groupby(results.records, key=lambda r: (r.case, r.dtype)):
        records = list(of_case)
        yield from ("", f"{records[0].case}, {records[0].dtype}, {records[0].device}")
        for _, of_operation in groupby(records, key=lambda r: (r.op, r.state)):
            yield from rows(list(of_operation))
    yield from ("", EXPLANATION)
    if results.host:
        yield from ("", *host_rows(results.host))


def rows(records: Sequence[Record]) -> list[str]:
    """Return the rows of one operation; what failed the gate gets its error and no speed-up."""
    lines = [f"{records[0].op}:{records[0].state}"]
    for r in records:
        times = "-" if r.p20_us is None else f"{duration(r.p20_us)}-{duration(r.p80_us)}"
        ratios = "-" if r.speedup_p20 is None else f"{ratio(r.speedup_p20)}-{ratio(r.speedup_p80)}"
        error = "-" if r.max_rel_error is None else f"{r.max_rel_error:.1e}"
        lines.append(
            f"  {r.impl:<22} {duration(r.p50_us):>9} {times:>15} {percent(r.pct_of_bound):>7}"
            f" {ratio(r.speedup_vs_torch):>8} {ratios:>13} {error:>8}"
        )
        if r.problem is not None:
            lines.append(f"{'':<25}NOT OK: {r.problem}"[:100])
    return lines


def host_rows(times: Sequence[HostTime]) -> list[str]:
    """Return the table of host times, one row per implementation."""
    counts = list(dict.fromkeys(t.tensors for t in times))
    costs = host_costs(times)
    lines = [
        "host time of clip_grad_norm_, warm, for a number of one-element tensors",
        f"{'':<24}" + "".join(f"{count:>10,}" for count in counts) + f"{'each further':>16}",
    ]
    for impl in dict.fromkeys(t.impl for t in times):
        cells = "".join(f"{duration(t.p50_us):>10}" for t in times if t.impl == impl)
        further = f"{costs[impl].us_per_further:.3f} us" if impl in costs else "-"
        lines.append(f"{impl:<24}{cells}{further:>16}")
    return lines


# ---------------------------------------------------------------- formats


def duration(us: float | None) -> str:
    """Return microseconds in the unit that suits them."""
    if us is None:
        return "-"
    value, unit = (us, "us") if us < 1e3 else (us / 1e3, "ms") if us < 1e6 else (us / 1e6, "s")
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def ratio(value: float | None) -> str:
    """Return a speed-up in three digits."""
    if value is None:
        return "-"
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def percent(value: float | None) -> str:
    """Return a share of a bound in two digits."""
    if value is None:
        return "-"
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %" if value >= 0.1 else "< 0.1 %"


def amount(size: int) -> str:
    """Return bytes in the decimal unit that suits them."""
    for unit, bytes_of_it in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_of_it:
            return f"{size / bytes_of_it:.3g} {unit}"
    return f"{size} B"
