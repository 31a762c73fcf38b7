"""The CPU kernels on several threads: equal bits, torch's number of threads, forks, other Python threads."""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cases import REAL_DTYPES
from oracle import parameter
from subprocesses import run_python
from torch import Tensor

import gradclip_ext
from gradclip_ext import _extension

if _extension.C is None:
    pytest.skip(f"needs the compiled module, but {_extension.REASON}", allow_module_level=True)


def with_grads(*grads: Tensor) -> list[torch.nn.Parameter]:
    return [parameter(grad) for grad in grads]


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
            found.add(gradclip_ext.get_total_norm(given, norm_type, backend="cpu").item())
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
    """If torch's thread pool is not found, the kernels run on threads of their own, or on one."""
    params = with_grads(torch.randn(1 << 24))

    def work() -> None:
        gradclip_ext.clip_grad_norm_(params, math.inf, backend="cpu")

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
    """Each tensor is so small that torch uses one thread: torch.nn.utils passes this test."""
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
    """They stay referenced for as long as they are read: their memory must not be reused.

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
