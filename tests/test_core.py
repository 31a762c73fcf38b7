"""The compiled core by itself: index arithmetic, threads, what is handed back."""

from __future__ import annotations

import math
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import REAL_DTYPES, SEED, name_of
from oracle import parameter
from subprocesses import run_python
from torch import Tensor

import gradclip_ext
from gradclip_ext import _core

if _core.C is None:
    pytest.skip(f"needs the compiled module, but {_core.REASON}", allow_module_level=True)

core = _core.C.cpu
testing = _testing


def with_grads(*grads: Tensor) -> list[torch.nn.Parameter]:
    return [parameter(grad) for grad in grads]


# ---------------------------------------------------------------- index arithmetic


@pytest.mark.parametrize("check", ["check_cuts", "check_splits", "check_aliasing"])
def test_a_million_random_lists(check: str) -> None:
    """Compared in C++ with walking along the list; the message of a failure holds the list's seed."""
    getattr(testing, check)(SEED, 1_000_000)


def naive_chunks(numels: list[int], sizes: list[int], chunk_bytes: int) -> Iterator[tuple[int, int, int]]:
    for tensor, (numel, size) in enumerate(zip(numels, sizes)):
        most = chunk_bytes // size
        for offset in range(0, numel, most):
            yield tensor, offset, min(most, numel - offset)


def test_chunks() -> None:
    rng = random.Random(SEED)
    for _ in range(300):
        dtypes = [rng.choice(REAL_DTYPES) for _ in range(rng.randrange(9))]
        chunk_bytes = 8 * 2 ** rng.randrange(5)
        numels = [max(0, chunk_bytes // d.itemsize * rng.randrange(4) + rng.randrange(-1, 2)) for d in dtypes]
        found = testing.chunks(numels, [name_of(d) for d in dtypes], chunk_bytes)
        assert found == list(naive_chunks(numels, [d.itemsize for d in dtypes], chunk_bytes)), f"seed {SEED}"


def test_chunks_beyond_32_bits() -> None:
    numels = [2**31 + 1, 0, 2**40, 3]
    found = testing.chunks(numels, ["float16"] * 4, 2**32)
    assert found == list(naive_chunks(numels, [2] * 4, 2**32))
    assert found[1] == (0, 2**31, 1) and found[-1] == (3, 0, 3) and len(found) == 2 + 512 + 1


def test_launches_cover_the_list_once() -> None:
    rng = random.Random(SEED)
    numels = [rng.randrange(100) for _ in range(5000)]
    found = testing.launches(numels, ["float32"] * 5000, 64)
    tensors = chunks = 0
    for first_tensor, count, first_chunk, chunk_count in found:
        assert (first_tensor, first_chunk) == (tensors, chunks)
        tensors += count
        chunks += chunk_count
    assert tensors == 5000 and chunks == sum(-(-n // 16) for n in numels)
    assert 1600 <= max(count for _, count, _, _ in found) <= 2000


@pytest.mark.parametrize(
    ("addresses", "found"),
    [
        ([0, 40, 80], "none"),
        ([80, 40, 0], "none"),
        ([40, 80, 0], "none"),
        ([80, 0, 40, 0], "duplicates"),
        ([80, 0, 76, 40], "overlap"),
        ([80, 0, 40, 0, 4], "overlap"),
    ],
)
def test_aliasing(addresses: list[int], found: str) -> None:
    assert testing.aliasing(addresses, [10] * len(addresses), "float32") == found
    assert testing.aliasing([*addresses, 44], [*[10] * len(addresses), 0], "float32") == found


# ---------------------------------------------------------------- determinism and threads


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_the_bits_depend_on_nothing_but_the_values(norm_type: float, threads: Callable[[int], None]) -> None:
    shapes = [(300, 1000), (7,), (0,), (123457,), (), (1 << 20,)]
    tensors = [torch.randn(shape).to(REAL_DTYPES[i % 4]) for i, shape in enumerate(shapes * 4)]
    moved = [torch.cat([t.new_zeros(3), t.reshape(-1)])[3:] for t in tensors]
    found = set()
    for count in (1, 2, 3, 8):
        threads(count)
        for given in (tensors, moved):
            norm, left = core.norm(given, norm_type)
            assert left == []
            found.add(norm.item())
    assert len(found) == 1


def busy_threads(work: Callable[[], object], seconds: float) -> int:
    """Return how many threads of this process spent CPU time while ``work`` ran for a while."""

    def ticks() -> dict[str, int]:
        used = {}
        for task in Path("/proc/self/task").iterdir():
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            used[task.name] = int(fields[11]) + int(fields[12])
        return used

    code = threading.Event()
    stop = threading.Timer(seconds, code.set)
    before = ticks()
    stop.start()
    while not code.is_set():
        work()
    after = ticks()
    return sum(after[task] - before.get(task, 0) > 3 for task in after)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one processor")
def test_torchs_thread_count_is_kept(threads: Callable[[int], None]) -> None:
    """Compiled without OpenMP, at::parallel_for runs on one thread and nothing complains."""
    params = with_grads(torch.randn(1 << 24))

    def work() -> None:
        gradclip_ext.clip_grad_norm_(params, math.inf)

    threads(2)
    assert busy_threads(work, 1.0) >= 2
    threads(1)
    work()  # idle threads of the pool spin for a moment before they sleep
    torch.zeros(()).item()
    assert busy_threads(lambda: None, 0.5) == 1
    assert busy_threads(work, 1.0) == 1


FORK_SCRIPT = """
import os, warnings
import torch, gradclip_ext

warnings.simplefilter("ignore")  # Python's own, about forking with threads
torch.set_num_threads(2)

def clip():
    params = [torch.nn.Parameter(torch.empty(5000)) for _ in range(400)]
    for param in params:
        param.grad = torch.ones(5000)
    return gradclip_ext.clip_grad_norm_(params, 1.0).item(), params[0].grad[0].item()

expected = clip()  # starts the pool's threads, which the child does not have
child = os.fork()
if child == 0:
    os._exit(0 if clip() == expected else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_does_not_wait_for_its_parent_s_threads() -> None:
    """Each tensor is small enough for torch to take one thread: torch.nn.utils gets through this."""
    assert run_python("-c", FORK_SCRIPT, timeout=60) == "0\n"


def test_two_threads_clip_different_lists() -> None:
    lists = [with_grads(*(torch.full((1 << 18,), 1.0 + k) for _ in range(8))) for k in range(4)]
    found: list[list[float]] = [[] for _ in lists]

    def clip(k: int) -> None:
        for round_ in range(10):
            bound = 2.0**-round_ * 1000
            found[k].append(gradclip_ext.clip_grad_norm_(lists[k], bound).item())

    workers = [threading.Thread(target=clip, args=(k,)) for k in range(len(lists))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for k, norms in enumerate(found):
        expected = [(1.0 + k) * math.sqrt(8 << 18), *(2.0**-r * 1000 for r in range(9))]
        assert norms == pytest.approx(expected, rel=1e-5)


def test_gradients_dropped_while_another_thread_clips() -> None:
    """They stay referenced for as long as they are read; their memory must not be handed out again.

    The other thread gets the interpreter when the kernels start. Any earlier, torch itself
    crashes: a gradient that is being freed can still be read from its parameter.
    """
    started, finished = threading.Event(), threading.Event()
    params: list[torch.nn.Parameter] = []
    dropped_in_time = []

    def drop() -> None:
        started.wait()
        for param in params:
            param.grad = None
        dropped_in_time.append(not finished.is_set())
        for _ in params:
            torch.full((1 << 18,), math.nan)

    interval = sys.getswitchinterval()
    for _ in range(5):
        params = with_grads(*(torch.ones(1 << 18) for _ in range(100)))
        started.clear()
        finished.clear()
        dropper = threading.Thread(target=drop)
        dropper.start()
        sys.setswitchinterval(10.0)
        started.set()
        norm = gradclip_ext.clip_grad_norm_(params, 1.0)
        finished.set()
        sys.setswitchinterval(interval)
        dropper.join()
        assert norm == math.sqrt(100 << 18) and all(p.grad is None for p in params)
    assert any(dropped_in_time)


# ---------------------------------------------------------------- what is handed back


class Subclass(Tensor):
    pass


def lazy_negative() -> Tensor:
    return torch.randn(3, dtype=torch.complex64).conj().imag


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


ALONE: dict[str, Callable[[], object]] = {
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "integer": lambda: torch.arange(3),
    "gaps": lambda: torch.randn(10)[::2],
    "expanded": lambda: torch.randn(1).expand(5),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "negative view": lazy_negative,
    "meta": lambda: torch.empty(3, device="meta"),
    "inference tensor": inference_tensor,
}
WITH_THE_LIST: dict[str, Callable[[], object]] = {
    "subclass": lambda: torch.randn(3).as_subclass(Subclass),
    "not a tensor": lambda: None,
}
SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "listed twice": lambda base: base,
    "overlapping": lambda base: base.view(-1)[1:],
}


@pytest.mark.parametrize("what", ALONE)
def test_unusual_tensors_stay_behind_alone(what: str) -> None:
    listed = [torch.full((5,), 2.0), ALONE[what](), torch.zeros(0), torch.full((2, 3), 4.0).double()]
    norm, left = core.norm(listed, 1.0)
    if what != "inference tensor":  # may be read, not written
        assert left == [1] and norm == 34.0 and norm.dtype == torch.float64
        assert core.get_total_norm(listed, 2.0) is None
    assert core.scale_(listed, torch.tensor(0.5)) == [1]
    assert core.clamp_(listed, -1.5, 1.5) == [1]
    assert (listed[0] == 1.0).all() and (listed[3] == 1.5).all()


@pytest.mark.parametrize("what", [*WITH_THE_LIST, *SHARED])
def test_lists_that_stay_behind_whole(what: str) -> None:
    base = torch.full((5,), 2.0)
    other = WITH_THE_LIST[what]() if what in WITH_THE_LIST else SHARED[what](base)
    listed = [torch.ones(3), base, other]
    assert core.get_total_norm(listed, 2.0) is None
    assert core.scale_(listed, torch.tensor(0.5)) == [0, 1, 2]
    assert core.clamp_(listed, -0.5, 0.5) == [0, 1, 2]
    assert (listed[0] == 1.0).all() and (base == 2.0).all()


@pytest.mark.parametrize("what", [*ALONE, *SHARED])
def test_calls_come_back_untouched(what: str) -> None:
    base = torch.full((5,), 2.0)
    other: Any = ALONE[what]() if what in ALONE else SHARED[what](base)
    params = with_grads(torch.ones(3), base, other)
    assert core.clip_grad_norm_(params, 0.1, 2.0, False) is None
    assert core.clip_grads_with_norm_(params, 0.1, torch.tensor(5.0)) is False
    assert core.clamp_grad_(params, -0.1, 0.1) is False
    assert (params[0].grad == 1.0).all() and (base == 2.0).all()


def test_orders_without_a_kernel_come_back() -> None:
    for norm_type in (0.0, -0.0, -1.0, -math.inf, math.nan):
        assert core.get_total_norm([torch.ones(3)], norm_type) is None
        assert core.clip_grad_norm_(with_grads(torch.ones(3)), 1.0, norm_type, False) is None


def test_bounds_that_a_dtype_cannot_hold_come_back() -> None:
    for dtype, bound in ((torch.float16, 65505.0), (torch.bfloat16, 3.4e38), (torch.float32, 3.5e38)):
        for low, high in ((-bound, 1.0), (-1.0, bound)):
            assert core.clamp_grad_(with_grads(torch.ones(3, dtype=dtype)), low, high) is False
        assert core.clamp_grad_(with_grads(torch.ones(3, dtype=dtype)), -math.inf, math.inf) is True


def test_whoever_follows_torchs_operations_sees_some() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC0415

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    params = with_grads(torch.ones(4))
    with Names() as names:
        assert gradclip_ext.clip_grad_norm_(params, 1.0) == 2.0
    assert any("norm" in name or "dot" in name for name in names.seen), names.seen

    assert core.get_total_norm([torch.ones(3)], 1.0) == 3.0
    seen: list[object] = []
    torch.func.vmap(lambda x: (seen.append(core.get_total_norm([x], 1.0)), x)[1])(torch.ones(2, 3))
    assert seen == [None]


# ---------------------------------------------------------------- the whole call


def test_every_version_counter_moves_once() -> None:
    for calls in (
        lambda p: core.clip_grad_norm_(p, 0.1, 2.0, False),
        lambda p: core.clip_grad_norm_(p, 1e9, 2.0, False),
        lambda p: core.clip_grad_norm_(p, math.inf, 2.0, False),
        lambda p: core.clip_grads_with_norm_(p, 0.1, torch.tensor(3.0)),
        lambda p: core.clamp_grad_(p, -0.1, 0.1),
        lambda p: core.clamp_grad_(p, -9.0, 9.0),
    ):
        params = with_grads(torch.ones(3), torch.zeros(0), torch.ones(1 << 19))
        assert calls(params) is not None
        assert [p.grad._version for p in params if p.grad is not None] == [1, 1, 1]


def test_a_refused_call_changes_nothing() -> None:
    for bad, dtype in ((math.nan, torch.float32), (math.inf, torch.bfloat16), (3e38, torch.float32)):
        grads = [torch.ones(4), torch.full((3,), bad, dtype=dtype)]
        before = [g.clone() for g in grads]
        norm, refused = core.clip_grad_norm_(with_grads(*grads), 1.0, 2.0, True)
        assert refused and not torch.isfinite(norm)
        for grad, old in zip(grads, before):
            assert grad._version == 0 and torch.equal(grad.nan_to_num(7), old.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_the_coefficient_is_the_one_of_the_general_path(dtype: torch.dtype) -> None:
    rng = random.Random(SEED)
    for _ in range(500):
        norm = torch.tensor(10 ** rng.uniform(-9, 9), dtype=dtype)
        max_norm = rng.choice([10 ** rng.uniform(-9, 9), norm.item(), 0.0, 1e300])
        coef = torch.clamp((norm + 1e-6).reciprocal() * max_norm, max=1.0)
        grad = torch.ones(1, dtype=dtype)
        core.clip_grads_with_norm_(with_grads(grad), max_norm, norm)
        assert torch.equal(grad, coef.reshape(1)), (norm.item(), max_norm)


def test_results_are_new_and_of_the_right_dtype() -> None:
    params = with_grads(torch.ones(4), torch.ones(4, dtype=torch.bfloat16))
    first, second = (core.clip_grad_norm_(params, math.inf, 2.0, False)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr() and first.dtype == torch.float32 and first.dim() == 0
    assert not first.requires_grad and first._version == 0
    with_wide = [*params, *with_grads(torch.zeros(0, dtype=torch.float64))]
    wide, _ = core.clip_grad_norm_(with_wide, 9.0, 2.0, False)
    assert wide.dtype == torch.float64
    for empty in ([], [torch.nn.Parameter(torch.ones(3))]):
        assert core.clip_grad_norm_(empty, 1.0, 2.0, False) is None, "torch's defaults decide, in Python"
