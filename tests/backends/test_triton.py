"""The triton backend: what it launches, and when it cannot serve. Looked at without Triton.

The kernels themselves: test_triton_interpreted.py, which runs test_triton_kernels.py and the suite;
test_triton_compiled.py. Whole calls: test_triton_fused.py.
"""

from __future__ import annotations

import importlib
import math
import struct
import threading
import warnings
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from subprocesses import run_with_triton
from torch import Tensor
from triton_fakes import FakeKernel, launches, with_fake_kernels

import gradclip_ext
from gradclip_ext import backends
from gradclip_ext.backends import memory
from gradclip_ext.backends.triton import CompileError, TritonBackend

# ---------------------------------------------------------------- launches


def all_verbs(backend: TritonBackend, grads: list[Tensor]) -> None:
    backend.norm(grads, 2.0)
    backend.scale_(grads, torch.tensor(0.5))
    backend.clamp_(grads, -1.0, 1.0)


def test_launches_do_not_grow_with_the_list(log: list) -> None:
    for count in (1, 10, 5000):
        log.clear()
        all_verbs(with_fake_kernels(log), [torch.ones(3) for _ in range(count)])
        assert launches(log) == ["norm_kernel", "finish_kernel", "scale_kernel", "clamp_kernel"]


def test_one_launch_per_dtype(log: list) -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
    all_verbs(with_fake_kernels(log), [torch.ones(3, dtype=d) for d in dtypes * 20])
    names = ["norm_kernel"] * 4 + ["finish_kernel"] + ["scale_kernel"] * 4 + ["clamp_kernel"] * 4
    assert launches(log) == names


def test_clipping_by_norm_is_one_look_and_three_launches(log: list) -> None:
    backend = with_fake_kernels(log)
    grads = [torch.ones(3) for _ in range(100)]
    versions = [g._version for g in grads]
    norm = backend.clip_norm_(grads, 1.0, 2.0)
    assert norm is not None and norm.dtype == torch.float32
    assert launches(log) == ["norm_kernel", "finish_kernel", "scale_kernel"]
    assert all(g._version > v for g, v in zip(grads, versions))
    wide = backend.clip_norm_([*grads, torch.empty(0, dtype=torch.float64)], 1.0, 2.0)
    assert wide is not None and wide.dtype == torch.float64, "a zero-size gradient decides, too"


def test_clipping_by_norm_does_all_or_nothing(log: list) -> None:
    memory = torch.ones(9)
    for grads, p in (
        ([torch.ones(3)], 0.0),
        ([torch.ones(3)], -math.inf),
        ([torch.empty(0)], 2.0),
        ([torch.ones(3), torch.ones(3, dtype=torch.complex64)], 2.0),
        ([torch.ones(3), memory[::2]], 2.0),
        ([memory[:5], memory[4:]], 2.0),
    ):
        assert with_fake_kernels(log).clip_norm_(grads, 1.0, p) is None
    fails = lambda constants: "CHUNK" not in constants  # finish_kernel alone
    assert with_fake_kernels(log, fails=fails).clip_norm_([torch.ones(3)], 1.0, 2.0) is None
    assert launches(log) == []


def test_a_binary_is_looked_for_once(log: list) -> None:
    """Triton takes longer to find one than to launch it."""
    backend = with_fake_kernels(log)
    for grads in ([torch.ones(3)], [torch.ones(100_000) for _ in range(7)], [torch.ones(1)]):
        all_verbs(backend, grads)
    assert sum(what == "compile" for what, _, _ in log) == 4
    for more, different in (
        (1, lambda: backend.scale_(grads, torch.tensor(0.5, dtype=torch.float64))),
        (2, lambda: backend.norm(grads, 1.0)),
        (1, lambda: backend.clamp_([torch.ones(3).half()], -1.0, 1.0)),
        (1, lambda: backend.clip_norm_(grads, 1.0, 2.0)),  # a coefficient besides, in float32
        (1, lambda: backend.clip_norm_(grads, math.inf, 2.0)),
    ):
        log.clear()
        different()
        different()
        assert sum(what == "compile" for what, _, _ in log) == more


def test_bounds_keep_the_sign_of_zero(log: list) -> None:
    """0.0 == -0.0, for a cache of rounded bounds, too."""
    backend = with_fake_kernels(log)
    for low, high in ((-0.0, 0.0), (0.0, 0.0), (-0.0, -0.0)):
        backend.clamp_([torch.ones(3)], low, high)
        assert [struct.unpack("d", struct.pack("q", bits))[0].hex() for bits in log[-1][2][:2]] == [
            low.hex(),
            high.hex(),
        ]


def test_launchers_are_given_constants_from_some_version_on(log: list) -> None:
    backend = with_fake_kernels(log)
    for takes, more in ((True, 6), (False, 0)):
        backend._launcher_takes_constants = takes
        backend.scale_([torch.ones(3)], torch.tensor(0.5))
        _, name, given = log[-1]
        assert name == "scale_kernel" and len(given) == 4 + more


def test_tables_are_uploaded_only_when_something_changed(log: list) -> None:
    backend = with_fake_kernels(log)
    memory = torch.ones(4096)
    first, second = [memory[:100], torch.ones(3)], [memory[:99], torch.ones(3)]

    def table(grads: list[Tensor]) -> Tensor:
        backend.scale_(grads, torch.tensor(0.5))
        rows: Tensor = log[-1][2][1]
        return rows

    tables = [table(first), table(second)]
    assert table(list(first)) is tables[0] and table(second) is tables[1], (
        "two lists in turn keep their tables"
    )
    assert tables[0].tolist()[:3] == [memory.data_ptr(), 100, 0]
    for changed in (memory[:100].view(torch.int32).view(torch.float16), memory[1:101], memory[:200:2]):
        assert table([changed, first[1]]) is not tables[0]


def test_two_threads_never_fill_a_workspace_at_the_same_time(log: list) -> None:
    """A workspace is filled and its launches enqueued by one thread at a time."""
    running, most = 0, 0

    class Kernel(FakeKernel):
        def launch(self, *args: Any) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            threading.Event().wait(0.001)
            running -= 1

    backend = with_fake_kernels(log)
    for name in vars(backend._kernels):
        if name != "tl":
            setattr(backend._kernels, name, Kernel(name, log))
    lists = [[torch.ones(n)] for n in (3, 4)]
    threads = [threading.Thread(target=lambda g=g: [all_verbs(backend, g) for _ in range(5)]) for g in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_what_a_captured_graph_reads_is_never_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.empty

    def pageable(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return plain(*args, **options)  # page-locked memory needs a GPU

    monkeypatch.setattr(torch, "empty", pageable)
    monkeypatch.setattr(memory, "_SLAB_NUMEL", 100)
    slab = memory._Slab()
    taken = [slab.take(numel).fill_(numel) for numel in (30, 60, 20, 500, 90)]
    assert all((t == n).all() and t.numel() == n for t, n in zip(taken, (30, 60, 20, 500, 90)))
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in taken)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(any(t is kept for kept in slab._taken) for t in taken)


# ---------------------------------------------------------------- when it cannot serve


def test_compile_failure_raises_when_the_backend_was_named(log: list) -> None:
    backend = with_fake_kernels(log, fails=lambda constants: True)
    grads = [torch.randn(3), torch.randn(4)]
    before = [g.clone() for g in grads]
    for call in (
        lambda: backend.norm(grads, 2.0),
        lambda: backend.scale_(grads, torch.tensor(0.5)),
        lambda: backend.clamp_(grads, -0.1, 0.1),
    ):
        with pytest.raises(CompileError, match=r"failed to compile \w+_kernel .*no such instruction"):
            call()
    assert launches(log) == [] and all(torch.equal(a, b) for a, b in zip(grads, before))


def test_compile_failure_gives_way_to_foreach_with_one_warning(
    log: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = with_fake_kernels(log, backends.ALL["foreach"], fails=lambda constants: True)
    backend._reasons[torch.device("cpu")] = None  # as a GPU would be to it: usable, as far as it knows
    monkeypatch.setattr(backends, "_AUTOMATIC", {"triton": backend, "foreach": backends.ALL["foreach"]})
    monkeypatch.setattr(backends, "fused", lambda name, foreach: ())
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    with pytest.warns(RuntimeWarning, match="no such instruction") as caught:
        assert gradclip_ext.clip_grad_norm_(weight, 2.5) == 5.0
    assert len(caught) == 1 and "foreach" in str(caught[0].message)
    torch.testing.assert_close(weight.grad, torch.tensor([1.5, 2.0]))
    assert "no such instruction" in (backend.why_unavailable(torch.device("cpu")) or "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradclip_ext.clip_grad_value_(weight, 1.75)
        backend.scale_([weight.grad], torch.tensor(0.5))
        backend.clamp_([weight.grad], -0.8, 0.8)
    torch.testing.assert_close(weight.grad, torch.tensor([0.75, 0.8]))


def test_nothing_is_launched_before_everything_compiles(log: list) -> None:
    """Else a failure for the second dtype would leave the first one scaled, and foreach scale it again."""
    fails = lambda constants: constants.get("DTYPE") is torch.float16
    backend = with_fake_kernels(log, fails=fails)
    grads = [torch.ones(3), torch.ones(3, dtype=torch.float16)]
    for call in (lambda: backend.norm(grads, 2.0), lambda: backend.scale_(grads, torch.tensor(0.5))):
        with pytest.raises(CompileError):
            call()
    assert launches(log) == []


def test_the_automatic_choice_has_a_way_out_and_leaves_the_interpreter_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    automatic = backends._AUTOMATIC["triton"]
    assert isinstance(automatic, TritonBackend) and automatic._fallback is backends.ALL["foreach"]
    assert "by name" in (TritonBackend(backends.ALL["foreach"]).why_unavailable(torch.device("cpu")) or "")
    names = list(backends.ALL)
    assert names == list(backends._AUTOMATIC) and names[-1] == "foreach"


def imported(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Make importlib hand out these modules, or raise these errors."""
    genuine = importlib.import_module

    def import_module(name: str) -> Any:
        found = modules.get(name.rpartition(".")[2])
        if isinstance(found, Exception):
            raise found
        return found or genuine(name)

    monkeypatch.setattr(importlib, "import_module", import_module)


class JITFunction:
    """Stands for Triton's class of compiled kernels."""


@pytest.mark.parametrize("on", [True, False])
def test_reasons(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    """Every reason is a sentence, and there is none where a GPU and a fitting Triton are."""
    kernels = SimpleNamespace(norm_kernel=JITFunction() if on else object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9 - 3 * device.index, 1))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def reason(device: str = "cuda:0", **modules: Any) -> str | None:
        with monkeypatch.context() as patch:
            imported(patch, **modules)
            return TritonBackend().why_unavailable(torch.device(device))

    def triton(version: str) -> Any:
        return SimpleNamespace(__version__=version, JITFunction=JITFunction)

    assert "not for xpu" in (reason("xpu") or "")
    assert "TRITON_INTERPRET=1" in (reason("cpu") or "")
    for missing, said in (
        ("triton", "not installed"),
        ("numpy", "cannot be used here: ModuleNotFoundError: no"),
    ):
        assert said in (reason(triton=ModuleNotFoundError("no " + missing, name=missing)) or "")
    assert "OSError: libcuda" in (reason(triton=OSError("libcuda")) or "")
    assert "2.1.0 is too old: 3.2" in (reason(triton=triton("2.1.0")) or "")
    there = {"triton": triton("3.10.0+git1"), "triton_kernels": kernels}
    if not on:
        assert "cannot read GPU memory" in (reason(**there) or "")
        return
    assert "this device has 6.1" in (reason("cuda:1", **there) or "")
    assert reason("cuda:0", **there) is None, "the GPUs of one machine differ"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "after Triton had been imported" in (reason("cpu", **there) or "")
    # An interpreter that a newer NumPy has broken shows at its first launch.
    broken = {"triton": triton("3.6.0"), "triton_kernels": SimpleNamespace(norm_kernel=object())}
    assert "cannot be used here: AttributeError" in (reason("cpu", **broken) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA" in (reason(**there) or "")


def test_naming_it_without_triton_says_why() -> None:
    """In a process whose Triton, if there is one, cannot be imported."""
    code = """
import sys, torch
sys.modules["triton"] = None
import gradclip_ext
w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)
assert gradclip_ext.clip_grad_norm_(w, 9.0) > 0
try:
    gradclip_ext.clip_grad_norm_(w, 1.0, backend="triton")
except RuntimeError as error:
    print(error)
"""
    assert "not installed" in run_with_triton("-c", code, timeout=120, interpret=True)
    assert "TRITON_INTERPRET=1" in run_with_triton("-c", code, timeout=120)


def test_triton_is_not_imported_before_it_is_needed() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import gradclip_ext
w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)
gradclip_ext.clip_grad_norm_(w, 1.0)
gradclip_ext.clip_grad_value_(w, 1.0)
print([name for name in set(sys.modules) - before if name.split(".")[0] == "triton"])
"""
    assert run_with_triton("-c", code, timeout=120).strip() == "[]"
