"""``--check FILE``: is anything slower, or wrong, that was not when FILE was written?

What is compared is the speed-up over torch.nn.utils, because torch ran side by side with it both
times: a machine that is slower today slows both. A case counts as slower when four fifths of its
pairs are below what four fifths of the pairs reached then, so every single case is judged by the
noise it showed itself, and one is enough to fail. A run cannot see the noise between runs, so what
looks slower is measured again, twice, and counts only if it is slower every time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.implementations import OURS
from benchmarks.results import Key, Record, Results

# Assumed, not measured: between two runs memory is laid out anew, which no repeat within one sees.
LAYOUT_NOISE = 0.03
SAME_MACHINE = ("cpu", "cores", "gpu", "torch")
SAME_CODE = (*SAME_MACHINE, "gradclip_ext", "commit")


def incomparable(now: Results, before: Results, fields: Sequence[str]) -> str | None:
    """Return how two files differ in these fields of their machine blocks, or None if they do not."""
    for name in fields:
        if now.machine[name] != before.machine[name]:
            return f"its {name} is {before.machine[name]!r}, here it is {now.machine[name]!r}"
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
        if old is None or not old.ok or not record.impl.startswith(OURS):
            continue
        problem = record.problem if not record.ok else _slower(record, old)
        if problem is not None:
            what = f"{record.case} {record.dtype} {record.op}:{record.state} {record.impl}"
            found[record.key] = f"{what}: {problem}"
    return found


def compared(now: Results, before: Results) -> int:
    """Return how many records of ours are in both files."""
    earlier = {record.key for record in before.records}
    return sum(r.impl.startswith(OURS) and r.key in earlier for r in now.records)


def _slower(record: Record, old: Record) -> str | None:
    if record.speedup_p80 is None or old.speedup_p20 is None:
        return None
    if record.speedup_p80 >= old.speedup_p20 * (1 - LAYOUT_NOISE):
        return None
    return (
        f"{record.speedup_vs_torch:.2f}x ({record.speedup_p20:.2f}-{record.speedup_p80:.2f}), "
        f"was {old.speedup_vs_torch:.2f}x ({old.speedup_p20:.2f}-{old.speedup_p80:.2f})"
    )
