"""Four processes that stay alive for the session and run functions of the tests as ranks of a gloo world."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import compiled_module  # noqa: F401  (before the functions import gradclip_ext)
import pytest
import torch
import torch.distributed as dist

WORLD_SIZE = 4
# Longer than any case takes on a busy machine, shorter than waiting for a rank that never comes.
TIMEOUT = 60.0
# Starting four processes that import torch and a file of tests takes half a minute on a busy machine.
START = 180.0


class Ranks:
    """Runs ``function(*args)`` on every rank at once.

    After a failure or a timeout the processes are replaced: ranks may be in different collectives by then.
    """

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Return what the function returns on each rank; fail if it raises on one, or one does not return."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(START):
                self.stop()
                raise AssertionError(f"rank {rank} did not start within {START:.0f} s")
            pipe.recv()
        end = time.monotonic() + timeout
        answers: list[Any] = [None] * WORLD_SIZE
        while any(a is None for a in answers) and time.monotonic() < end:
            for rank, pipe in enumerate(self._pipes):
                if answers[rank] is None and pipe.poll(0.01):
                    answers[rank] = pipe.recv()
                    if not answers[rank][0]:  # the others may be waiting for this one
                        end = min(end, time.monotonic() + 3.0)
        waiting = [rank for rank, answer in enumerate(answers) if answer is None]
        failed = {rank: a[1] for rank, a in enumerate(answers) if a is not None and not a[0]}
        if waiting or failed:
            self.stop()
            reports = "\n".join(f"rank {rank}: {report}" for rank, report in failed.items())
            raise AssertionError(f"ranks {waiting} did not return, ranks {list(failed)} failed\n{reports}")
        return [answer[1] for answer in answers]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        init_file = os.path.join(tempfile.mkdtemp(), "init")
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, init_file, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The processes that the tests of a folder share."""
    workers = Ranks()
    yield workers
    workers.stop()


def _serve(rank: int, init_file: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{init_file}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    while True:
        function, args = pipe.recv()
        pipe.send("ready")
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
