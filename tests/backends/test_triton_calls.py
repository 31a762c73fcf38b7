"""Whole calls by the triton backend: lists that the compiled module reads. Looked at without Triton."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import REAL_DTYPES
from oracle import parameter
from triton_fakes import launches, with_fake_kernels

import gradclip_ext
from gradclip_ext import _core, backends
from gradclip_ext.backends.triton import TritonBackend
from gradclip_ext.backends.triton_fused import FusedTriton
from gradclip_ext.backends.triton_table import GatheredList, Table, TensorList, norm_dtype

pytestmark = pytest.mark.skipif(_core.C is None, reason=f"needs the compiled module: {_core.REASON}")


def fused_with(backend: TritonBackend) -> FusedTriton:
    return FusedTriton(backend, lambda device: True, cuda_only=False)


def test_compiled_module_and_python_read_the_same_of_a_list() -> None:
    assert _core.C is not None
    grads = [torch.randn(2 + i, 3).to(REAL_DTYPES[1 + i % 3]) for i in range(200)]
    grads[7] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for extra in ([], [torch.randn(5, dtype=torch.float16), torch.randn(1)[0]]):
        listed = [*grads, *extra]
        gathered = _core.C.gather(listed, False, False, False)
        assert gathered is not None
        by_module, by_python = GatheredList(gathered), TensorList(listed)
        for ours, theirs in zip(by_module.columns(), by_python.columns()):
            assert list(ours) == list(theirs)
        assert by_module.dtypes == by_python.dtypes and by_module.device == by_python.device
        tables = Table(by_module), Table(by_python)
        assert tables[0].rows == tables[1].rows and tables[0].groups == tables[1].groups
        assert not any(table.irregular for table in tables)
        assert not any(table.overlap(listing) for table, listing in zip(tables, (by_module, by_python)))
    empty = torch.empty(0, dtype=torch.float64)
    gathered = _core.C.gather([parameter(torch.ones(3)), parameter(empty)], True, True, False)
    assert gathered is not None
    assert norm_dtype(GatheredList(gathered)) == torch.float64, "a zero-size gradient decides, too"
    assert list(GatheredList(gathered).columns().numels) == [3]


def test_a_gathered_list_outlives_its_gradients() -> None:
    assert _core.C is not None
    parameters = [parameter(torch.ones(3))]
    gathered = _core.C.gather(parameters, True, True, False)
    kept = parameters[0].grad
    assert kept is not None and gathered is not None
    address, version = kept.data_ptr(), kept._version
    gathered.bump_versions()
    assert kept._version == version + 1
    parameters[0].grad = kept = None
    others = [torch.zeros(3) for _ in range(100)]
    assert all(t.data_ptr() != address for t in others)


def test_whole_calls(log: list) -> None:
    fused = fused_with(with_fake_kernels(log))
    grads = [torch.ones(3), torch.ones(5, dtype=torch.bfloat16)]
    parameters = [parameter(g) for g in grads]
    norm_ = ["norm_kernel"] * 2 + ["finish_kernel"]
    scale_ = ["scale_kernel"] * 2

    def launched_by(call: Any, *, bumps: bool) -> tuple[Any, list[str]]:
        log.clear()
        versions = [g._version for g in grads]
        result = call()
        assert all((g._version > v) == bumps for g, v in zip(grads, versions))
        return result, launches(log)

    served, found = launched_by(lambda: fused.clip_grad_norm_(parameters, 1.0, 2.0, False), bumps=True)
    assert served[0].dtype == torch.float32 and not served[1] and found == norm_ + scale_
    served, found = launched_by(lambda: fused.clip_grad_norm_(parameters, math.inf, 2.0, False), bumps=True)
    assert served is not None and found == norm_, "only a report"
    served, found = launched_by(lambda: fused.get_total_norm(grads, 1.0), bumps=False)
    assert served.dtype == torch.float32 and found == norm_
    total = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    served, found = launched_by(lambda: fused.clip_grads_with_norm_(parameters, 1.0, total), bumps=True)
    assert served and found == scale_
    served, found = launched_by(lambda: fused.clip_grads_with_norm_(parameters, math.inf, total), bumps=True)
    assert served and found == []
    served, found = launched_by(lambda: fused.clamp_grad_(parameters, -1.0, math.inf), bumps=True)
    assert served and found == ["clamp_kernel"] * 2
    with pytest.raises(RuntimeError, match="1e\\+39 cannot be represented"):
        fused.clamp_grad_(parameters, -1.0, 1e39)


def test_whole_calls_leave_alone_what_is_not_for_them(log: list) -> None:
    backend = with_fake_kernels(log)
    fused = fused_with(backend)
    memory = torch.ones(9)
    tied = torch.ones(3)
    for grads in (
        [],
        [torch.empty(0)],
        [memory[::2]],
        [memory[:5], memory[4:]],
        [tied, tied],
        [torch.ones(3, dtype=torch.complex64)],
    ):
        parameters = [parameter(g) for g in grads]
        assert fused.clip_grad_norm_(parameters, 1.0, 2.0, False) is None
        assert fused.get_total_norm(grads, 2.0) is None
        assert not fused.clip_grads_with_norm_(parameters, 1.0, torch.tensor(1.0))
        assert not fused.clamp_grad_(parameters, -1.0, 1.0)
    parameters = [parameter(tied)]
    assert fused.clip_grad_norm_(parameters, 1.0, 2.0, True) is None
    assert fused.clip_grad_norm_(parameters, 1.0, 0.0, False) is None
    assert fused.get_total_norm([tied], -math.inf) is None
    assert not fused.clip_grads_with_norm_(parameters, 1.0, torch.nn.Parameter(torch.tensor(1.0)))
    elsewhere = FusedTriton(backend, lambda device: device.type == "cuda", cuda_only=False)
    on_gpus = FusedTriton(backend, lambda device: pytest.fail("has been read"), cuda_only=True)
    failing = fused_with(with_fake_kernels(log, fails=lambda constants: True))
    for left in (elsewhere, on_gpus, failing):
        assert left.clip_grad_norm_(parameters, 1.0, 2.0, False) is None
        assert left.get_total_norm([tied], 2.0) is None
        assert not left.clip_grads_with_norm_(parameters, 1.0, torch.tensor(1.0))
        assert not left.clamp_grad_(parameters, -1.0, 1.0)
    assert launches(log) == []


def test_who_may_take_whole_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _core.C is not None
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    module, triton = backends.fused(None, None)
    assert module is _core.C.any_device and isinstance(triton, FusedTriton)
    (named,) = backends.fused("triton", True)
    assert isinstance(named, FusedTriton) and named._backend is backends.ALL["triton"]
    assert triton._backend is backends._AUTOMATIC["triton"] and triton._backend is not named._backend
    assert not triton._serves(torch.device("cpu")), "the compiled module's own"
    assert backends.fused("triton", False) == backends.fused("foreach", None) == ()
    assert _core.C.gather([torch.ones(3)], False, False, triton._cuda_only) is None, "no second look there"


def test_a_backend_that_is_no_name_is_an_error_of_ours() -> None:
    parameters = [parameter(torch.ones(3))]
    for backend in (["cpu"], {"cpu"}, 3):
        with pytest.raises(ValueError, match="does not exist; there are: cuda, triton, cpu, foreach"):
            gradclip_ext.clip_grad_norm_(parameters, 1.0, backend=backend)  # type: ignore[arg-type]
