"""The sizes of wheels that the README quotes are those of benchmarks/results/wheels.json."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_quotes_the_recorded_sizes() -> None:
    records = json.loads((ROOT / "benchmarks" / "results" / "wheels.json").read_text())
    wheels = [record for record in records if record["file"].endswith(".whl")]
    cpu = max(wheel["bytes"] for wheel in wheels if "CUDA" not in wheel["compiler"])
    (cuda,) = (wheel["bytes"] for wheel in wheels if "CUDA" in wheel["compiler"])
    readme = " ".join((ROOT / "README.md").read_text().split())
    quoted = re.findall(r"less than ([\d.]+) MB without CUDA kernels and ([\d.]+) MB with", readme)
    assert quoted == [(f"{math.ceil(cpu / 1e5) / 10:.1f}", f"{cuda / 1e6:.1f}")]
