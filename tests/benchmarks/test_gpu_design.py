"""python -m benchmarks.gpu_design without a GPU: it builds, explains itself, and calls what it measures."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from toolkit import find_toolkit
from torch import Tensor

from benchmarks import gpu_design, gpu_probes, machine
from benchmarks.cases import Case
from benchmarks.gpu_design import MEASUREMENTS, Bench, Finding
from benchmarks.machine import Call

CPU = torch.device("cpu")


class FakeBench(Bench):
    """Runs every call once, on the CPU, and says that it took a microsecond."""

    def __init__(self) -> None:
        self.device = CPU

    def us(self, call: Call) -> float:
        call()
        return 1.0

    def buffer(self, size: int) -> Tensor:
        return torch.empty(max(1, min(size, 1 << 22) // gpu_probes.TILE) * gpu_probes.TILE // 4)


class FakeProbes(gpu_probes.Probes):
    """Launches nothing."""

    def __init__(self, device: torch.device) -> None:
        self.processors, self.can_depend = 4, True
        self._sums = self._out = self._scratch = self.results = torch.empty(1)

    def _call(self, name: str, *arguments: Any) -> None:
        pass


def findings(number: int, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    monkeypatch.setattr(gpu_design, "Probes", FakeProbes)
    monkeypatch.setattr(machine, "host_us", machine.wall_us)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 << 30, 4 << 30))
    return list(MEASUREMENTS[number](FakeBench()))


@pytest.mark.parametrize("number", [1, 3, 4, 5, 8])
def test_measurements_with_probes(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(number, monkeypatch)
    assert {f.measurement for f in found} == {number}
    assert [f.unit for f in found if f.value is None] == (["not enough memory"] if number in (1, 8) else [])
    assert max(map(len, gpu_design.table(found))) <= 110


def test_host_times_are_asked_for_at_the_sizes_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings(6, monkeypatch)
    assert {f.what.rpartition(", ")[2] for f in found} == {"148 tensors", "291 tensors", "6,000 tensors"}
    assert all(f.predicted for f in found)


def test_replays_are_compared_with_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Case("gpt2-124m", "made up for the tests", ((30, 7), (64,)))
    monkeypatch.setitem(gpu_design.CASES, "gpt2-124m", small)
    result = torch.empty(())

    def captured(call: Call) -> tuple[Call, Tensor]:
        if call() is None:
            raise RuntimeError("nothing to capture")
        return lambda: result.copy_(call()), result

    monkeypatch.setattr(gpu_design, "_captured", captured)
    found = findings(7, monkeypatch)
    errors = [f.value for f in found if f.unit == "relative"]
    assert len(errors) >= 2
    assert max(errors) < 1e-2

    def refused(call: Call) -> tuple[Call, Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(gpu_design, "_captured", refused)
    assert all(f.value is None and "not permitted" in f.unit for f in findings(7, monkeypatch))


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_design.main([]) == 2
    assert "no GPU was found" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_design.main(["--help"])
    assert "7: clip_grad_norm_ of GPT-2" in capsys.readouterr().out


def test_probes_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toolkit = find_toolkit()
    if toolkit is None:
        pytest.skip("there is no CUDA toolkit")
    monkeypatch.setenv("PATH", f"{toolkit / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(gpu_probes, "OUT", tmp_path)
    library = ctypes.CDLL(str(gpu_probes.build()))
    names = ("probe_read", "probe_update", "probe_list", "probe_parameters")
    assert all(hasattr(library, name) for name in names)
    # A list without tensors launches nothing; 1 is cudaErrorInvalidValue.
    empty = [ctypes.c_int64(0)] * 3
    for table, error in [(281, 0), (282, 1), *((table, 0) for table in gpu_probes.TABLES)]:
        assert (
            library.probe_list(0, None, *empty, 0, table, ctypes.c_double(1), 1, 0, None, None, None) == error
        )
    assert gpu_probes.build() == tmp_path / "gpu_probes.so"


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_probes, "OUT", tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="nvcc is not on PATH"):
        gpu_probes.build()
