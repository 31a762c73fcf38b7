"""The times of the CUDA kernels before and after their second pass, predicted and measured.

The index of the results has it as tables, made from two files beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap

_PREDICTED, _MEASURED = "second-pass-predictions.json", "second-pass-nvidia-h200.json"


def section(folder: Path) -> Iterator[str]:
    """Yield a part of the index, or nothing where the two files are missing."""
    if not all((folder / name).exists() for name in (_PREDICTED, _MEASURED)):
        return
    predicted = json.loads((folder / _PREDICTED).read_text())
    measured = json.loads((folder / _MEASURED).read_text())
    before, after = (
        next(v for v in measured["variants"] if part in v["variant"]) for part in ("before", "8 blocks")
    )
    commits = [re.findall(r"\b[0-9a-f]{12}\b", v["variant"])[0] for v in (before, after)]
    gpu = measured["machine"]["gpu"]
    yield "## The CUDA kernels before and after their second pass"
    yield ""
    yield from wrap(
        f"Device time of `clip_grad_norm_` in us. What is called measured was [measured]({_MEASURED}) on an "
        f"{gpu}, with commits {commits[0]} and {commits[1]}; all else is [predicted]({_PREDICTED}) and was "
        f"measured nowhere. {predicted['source']}",
        width=110,
        break_on_hyphens=False,
        break_long_words=False,
    )
    names = sorted(predicted["us"], key=lambda name: name not in gpu)  # the GPU that was there first
    for column, state in enumerate(predicted["columns"]):
        yield ""
        guesses = " | ".join(f"predicted after, {name}" for name in names)
        yield f"| {state} | measured before | measured after | {guesses} |"
        yield "|---|" + "---|" * (2 + len(names))
        for key, times in before["us"].items():
            label = f"clip_grad_norm_, {state}"
            cells = [f"{us:,.1f}" for us in (times[label], after["us"][key][label])]
            cells += [_guess(predicted["us"][name].get(key), column) for name in names]
            yield f"| {key.replace(':', ', ')} | {' | '.join(cells)} |"
    yield ""


def _guess(times: list[float] | None, column: int) -> str:
    return "not predicted" if times is None else f"{times[column]:,}"
