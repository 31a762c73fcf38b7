"""What the triton backend compiles, uploads and launches for a call. Tested without Triton."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import REAL_DTYPES, clones, grads_of
from oracle import parameter
from torch import Tensor
from triton_fakes import KERNELS, FakeKernel, launches

import gradclip_ext
from gradclip_ext import _extension, backends
from gradclip_ext.backends.base import TensorList
from gradclip_ext.backends.triton import TritonBackend, memory

Install = Callable[..., TritonBackend]
needs_module = pytest.mark.skipif(
    _extension.C is None, reason=f"needs the compiled module: {_extension.REASON}"
)


def parameters_of(grads: list[Tensor]) -> list[Tensor]:
    return [parameter(g) for g in grads]


def clip_(params: list[Tensor], max_norm: float = 1.0, p: float = 2.0) -> Tensor:
    return gradclip_ext.clip_grad_norm_(params, max_norm, p, backend="triton")


def norm(grads: list[Tensor], p: float = 2.0) -> Tensor:
    return gradclip_ext.get_total_norm(grads, p, backend="triton")


def scale_(params: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    gradclip_ext.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0, dtype=dtype), backend="triton")


def clamp_(params: list[Tensor], low: float = -1.0, high: float = 1.0) -> None:
    gradclip_ext.clamp_grad_(params, low, high, backend="triton")


def all_operations(grads: list[Tensor]) -> None:
    params = parameters_of(grads)
    norm(grads)
    scale_(params)
    clamp_(params)


# ---------------------------------------------------------------- launches


def test_launches_do_not_grow_with_the_list(log: list, install: Install) -> None:
    for count in (1, 10, 5000):
        install()
        log.clear()
        all_operations([torch.ones(3) for _ in range(count)])
        assert launches(log) == list(KERNELS)


def test_one_launch_per_dtype(log: list, install: Install) -> None:
    install()
    dtypes = (torch.bfloat16, torch.float32, torch.float64, torch.float16)
    all_operations([torch.ones(3, dtype=d) for d in dtypes * 20])
    names = ["norm_kernel"] * 4 + ["finalize_kernel"] + ["scale_kernel"] * 4 + ["clamp_kernel"] * 4
    assert launches(log) == names


def test_clipping_by_norm_is_three_launches(log: list, install: Install) -> None:
    """One kernel writes norm and coefficient, and scale_kernel reads the coefficient from the device."""
    install()
    params = parameters_of([torch.ones(3) for _ in range(100)])
    versions = [p.grad._version for p in params]
    total = clip_(params)
    assert total.dtype == torch.float32
    assert launches(log) == ["norm_kernel", "finalize_kernel", "scale_kernel"]
    assert all(p.grad._version > v for p, v in zip(params, versions))
    (_, _, finished), (_, _, scaled) = [entry for entry in log if entry[0] == "launch"][1:]
    assert finished[0] is total and finished[1] is scaled[0] and finished[1].dtype == total.dtype
    empty = parameter(torch.empty(0, dtype=torch.float64))
    assert clip_([*params, empty]).dtype == torch.float64, "a zero-size gradient decides, too"


def test_what_each_call_launches_and_counts_as_a_change(log: list, install: Install) -> None:
    install()
    grads = [torch.ones(3), torch.ones(5, dtype=torch.bfloat16)]
    params = parameters_of(grads)
    norm_, scaled = ["norm_kernel"] * 2 + ["finalize_kernel"], ["scale_kernel"] * 2

    def launched_by(call: Callable[[], Any], *, bumps: bool) -> list[str]:
        log.clear()
        versions = [g._version for g in grads]
        call()
        assert all((g._version > v) == bumps for g, v in zip(grads, versions))
        return launches(log)

    assert launched_by(lambda: clip_(params), bumps=True) == norm_ + scaled
    assert launched_by(lambda: clip_(params, math.inf), bumps=True) == norm_, "only reports"
    assert log[-1][2][1] is None, "no coefficient where none is needed"
    assert launched_by(lambda: norm(grads, 1.0), bumps=False) == norm_
    assert launched_by(lambda: scale_(params, torch.float64), bumps=True) == scaled
    assert launched_by(lambda: clamp_(params, -1.0, math.inf), bumps=True) == ["clamp_kernel"] * 2
    total = torch.tensor(2.0)
    report = lambda: gradclip_ext.clip_grads_with_norm_(params, math.inf, total, backend="triton")
    assert launched_by(report, bumps=True) == []


def test_what_kernels_do_not_take_goes_to_foreach(log: list, install: Install) -> None:
    install()
    base = torch.ones(9)
    for grads in (
        [torch.empty(0)],
        [base[::2]],
        [torch.ones(3, dtype=torch.complex64)],
        [base[:5], base[4:]],
    ):
        before = clones(grads)
        params = parameters_of(grads)
        scale_(params)
        if len(grads) == 1:
            torch.testing.assert_close(grads[0], before[0] * 0.5)
    for p in (0.0, -math.inf, -1.0):
        expected = {0.0: 2.0, -1.0: 0.2, -math.inf: 1.0}[p]
        assert norm([torch.ones(3), torch.ones(2)], p).item() == pytest.approx(expected)
    assert launches(log) == []
    # Irregular tensors do not slow down the others.
    grads = [torch.ones(3), base[::2], torch.ones(4)]
    scale_(parameters_of(grads))
    assert launches(log) == ["scale_kernel"] and log[-1][2][2:4] == (0, 2)


def test_an_error_launches_and_changes_nothing(log: list, install: Install) -> None:
    install()
    good = parameter(torch.ones(3))
    sparse = parameter(torch.ones(3).to_sparse())
    expanded = parameter(torch.ones(1).expand(3))
    integer = torch.nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    integer.grad = torch.ones(3, dtype=torch.int32)
    version = good.grad._version
    for call in (
        lambda: clip_([good, sparse]),
        lambda: clip_([good, expanded]),
        lambda: clip_([good, integer]),
        lambda: clip_([good], -1.0),
        lambda: clip_([good], math.nan),
        lambda: clamp_([good], -1.0, 1e39),
        lambda: clamp_([good, expanded]),
        lambda: clamp_([good], 2.0, 1.0),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            call()
    assert log == [] and good.grad._version == version


def test_memory_that_two_gradients_share_is_scaled_once(log: list, install: Install) -> None:
    install()
    shared = torch.ones(6)
    params = parameters_of([shared, torch.ones(3), shared])
    clip_(params)
    assert launches(log) == ["norm_kernel", "finalize_kernel", "scale_kernel"]
    *_, (_, _, measured), _, (_, _, scaled) = [entry for entry in log if entry[0] == "launch"]
    assert measured[4] - measured[3] == 3 and scaled[3] - scaled[2] == 2, "tensors of the two tables"


# ---------------------------------------------------------------- binaries


def test_a_binary_is_looked_for_once(log: list, install: Install) -> None:
    """Triton takes longer to look up a binary than to launch it."""
    install()
    for grads in ([torch.ones(3)], [torch.ones(100_000) for _ in range(7)], [torch.ones(1)]):
        all_operations(grads)
    assert sum(what == "compile" for what, _, _ in log) == 4
    params = parameters_of(grads)
    half = parameter(torch.ones(3).half())
    for more, different in (
        (1, lambda: scale_(params, torch.float64)),
        (2, lambda: norm(grads, 1.0)),
        (1, lambda: clamp_([half])),
        (1, lambda: clip_(params)),  # with a coefficient
        (0, lambda: clip_(params, math.inf)),
    ):
        log.clear()
        different()
        different()
        assert sum(what == "compile" for what, _, _ in log) == more


def test_bounds_keep_the_sign_of_zero(log: list, install: Install) -> None:
    """0.0 == -0.0, for a cache of rounded bounds, too."""
    install()
    for low, high in ((-0.0, 0.0), (0.0, 0.0), (-0.0, -0.0)):
        clamp_([parameter(torch.ones(3))], low, high)
        given = [struct.unpack("d", struct.pack("q", bits))[0].hex() for bits in log[-1][2][:2]]
        assert given == [low.hex(), high.hex()]


def test_launchers_are_given_constants_from_some_version_on(log: list, install: Install) -> None:
    for takes, more in ((True, 5), (False, 0)):
        install()._launcher._takes_constants = takes
        memory._workspaces.clear()
        scale_([parameter(torch.ones(3))])
        _, name, given = log[-1]
        assert name == "scale_kernel" and len(given) == 4 + more


# ---------------------------------------------------------------- tables


@needs_module
@pytest.mark.skipif(
    _extension.C is not None and not _extension.C.CAN_READ, reason="this torch is read by Python"
)
def test_the_compiled_module_and_python_read_the_same_of_a_list() -> None:
    grads = [torch.randn(2 + i, 3).to(REAL_DTYPES[1 + i % 3]) for i in range(200)]
    grads[7] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    grads[9] = torch.empty(0, dtype=torch.float64)
    for extra in ([], [torch.randn(5, dtype=torch.float16), torch.randn(1)[0]]):
        listed = [*grads, *extra]
        native = _extension.C.read_tensors(listed, True)
        assert native is not None
        by_module, by_python = TensorList(listed, native), TensorList(listed)
        assert by_module.columns() == by_python.columns()
        assert by_module.dtypes == by_python.dtypes and by_module.device == by_python.device
        again = TensorList(listed)
        assert again.native().columns == by_python.columns(), "there and back"


def test_the_rows_of_a_table(log: list) -> None:
    chunk = memory.CHUNK_BYTES // 4
    tensors = [
        torch.ones(3),
        torch.ones(5).half(),
        torch.ones(chunk + 1),
        torch.empty(0),
        torch.ones(2).half(),
    ]
    a, b, c, _, d = (t.data_ptr() for t in tensors)
    table = memory.Table(TensorList(tensors).columns())
    assert table.rows.tolist() == [a, 3, 0, c, chunk + 1, 1, b, 5, 3, d, 2, 4, 0, 0, 5, 0, 2, 1, 3]
    assert table.groups == [(torch.float32, 0, 2, 3), (torch.float16, 2, 4, 2)] and table.chunks == 5


def test_tables_are_uploaded_only_when_something_changed(log: list, install: Install) -> None:
    install()
    base = torch.ones(4096)
    first, second = [base[:100], torch.ones(3)], [base[:99], torch.ones(3)]

    def table(grads: list[Tensor]) -> Tensor:
        scale_(parameters_of(grads))
        rows: Tensor = log[-1][2][1]
        return rows

    tables = [table(first), table(second)]
    assert table(list(first)) is tables[0] and table(second) is tables[1], "lists in turn keep their tables"
    assert tables[0].tolist()[:3] == [base.data_ptr(), 100, 0]
    for changed in (base[:100].view(torch.int32).view(torch.float16), base[1:101], base[:200:2]):
        assert table([changed, first[1]]) is not tables[0]
    clip_(parameters_of(first))
    norm(first)
    clamp_(parameters_of(first))
    place = {"norm_kernel": 0, "scale_kernel": 1, "clamp_kernel": 2}  # of the table among the arguments
    launched = [entry for entry in log if entry[0] == "launch" and entry[1] in place][-4:]
    assert [name for _, name, _ in launched] == ["norm_kernel", "scale_kernel", "norm_kernel", "clamp_kernel"]
    assert all(given[place[name]] is tables[0] for _, name, given in launched)
    for count in range(1, memory._MAX_TABLES + 1):
        scale_(parameters_of([base[:count]]))
    assert table(first) is not tables[0], "the oldest tables go"


def test_a_captured_call_uploads_its_table_once(
    log: list, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A workspace of its own, which nothing else can overwrite before the graph is replayed."""
    install()
    uploads: list[memory.Workspace] = []

    class Captured(memory.Workspace):
        def _upload(self, rows: Any) -> Tensor:
            uploads.append(self)
            return super()._upload(rows)

    monkeypatch.setattr(memory, "_workspace", lambda device, on_gpu: Captured(device, captured=True))
    params = parameters_of([torch.ones(3), torch.ones(4)])
    for count in (1, 2):
        clip_(params)
        assert len(uploads) == count
    assert uploads[0] is not uploads[1]
    tables = [entry[2][0] for entry in log if entry[:2] == ("launch", "norm_kernel")]
    assert tables[0] is not tables[1] and memory._workspaces == {}


def test_each_stream_has_a_workspace(log: list, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")  # stands for a GPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(memory, "current_stream", lambda device: (0, True))
    first = memory._workspace(device, True)
    assert memory._workspace(device, True) is first
    monkeypatch.setattr(memory, "current_stream", lambda device: (7, True))
    second = memory._workspace(device, True)
    assert second is not first and memory._workspace(device, True) is second
    monkeypatch.setattr(memory, "current_stream", lambda device: (7, False))
    assert memory._workspace(device, True) is not memory._workspace(device, True) is not second
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = memory._workspace(device, True)
    assert captured._captured and memory._workspace(device, True) is not captured


def test_two_threads_never_fill_a_workspace_at_the_same_time(log: list, install: Install) -> None:
    """A workspace is filled and its launches enqueued by one thread at a time."""
    running = max_running = 0

    class Kernel(FakeKernel):
        def launch(self, *args: Any) -> None:
            nonlocal running, max_running
            running += 1
            max_running = max(max_running, running)
            threading.Event().wait(0.001)
            running -= 1
            super().launch(*args)

    install(kind=Kernel)
    lists = [[torch.ones(n)] for n in (3, 4)]
    threads = [threading.Thread(target=lambda g=g: [all_operations(g) for _ in range(5)]) for g in lists]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max_running == 1 and len(launches(log)) == 40


def test_what_a_captured_graph_reads_is_never_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.empty

    def pageable(*args: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return plain(*args, **options)  # page-locked memory needs a GPU

    monkeypatch.setattr(torch, "empty", pageable)
    monkeypatch.setattr(memory, "_BLOCK_NUMEL", 100)
    pinned = memory._PinnedMemory()
    used = [pinned.take(numel).fill_(numel) for numel in (30, 60, 20, 500, 90)]
    assert all((t == n).all() and t.numel() == n for t, n in zip(used, (30, 60, 20, 500, 90)))
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in used)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(any(t is kept for kept in pinned._used) for t in used)


# ---------------------------------------------------------------- the choice


def test_insisting_on_triton_passes_by_the_other_backends(log: list, install: Install) -> None:
    install()
    params = parameters_of([torch.ones(3)])
    clip_(params)
    assert launches(log) != []
    log.clear()
    gradclip_ext.clip_grad_norm_(params, 1.0)
    gradclip_ext.clip_grad_norm_(params, 1.0, foreach=False)
    assert log == [] and grads_of(params)[0].max() < 1.0
    with pytest.raises(ValueError, match="foreach=False"):
        gradclip_ext.clip_grad_norm_(params, 1.0, foreach=False, backend="triton")


def test_a_backend_that_is_no_name_is_an_error_of_ours() -> None:
    params = [parameter(torch.ones(3))]
    for backend in (["cpu"], {"cpu"}, 3):
        with pytest.raises(ValueError, match=f"does not exist; there are: {', '.join(backends.ALL)}"):
            gradclip_ext.clip_grad_norm_(params, 1.0, backend=backend)  # type: ignore[arg-type]
