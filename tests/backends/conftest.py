"""Fixtures for testing the triton backend without Triton, and backends on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu import WHY_NOT
from triton_fakes import with_fake_kernels

from gradclip_ext import backends
from gradclip_ext.backends.triton import TritonBackend, memory


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, tuple]]:
    """The list in which triton_fakes.py records; tables of earlier tests are deleted."""
    monkeypatch.setattr(memory, "_workspaces", {})
    return []


@pytest.fixture
def install(log: list, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TritonBackend]:
    """install(**options) makes ``backend="triton"`` one with fake kernels, and takes CPU tensors to it."""
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)

    def installed(**options: object) -> TritonBackend:
        backend = with_fake_kernels(log, **options)  # type: ignore[arg-type]
        backend._reasons[torch.device("cpu")] = None  # it supports the CPU now
        monkeypatch.setitem(backends.ALL, "triton", backend)
        return backend

    return installed


@pytest.fixture(params=["cuda", pytest.param("triton", marks=pytest.mark.triton)])
def name(request: pytest.FixtureRequest) -> str:
    if WHY_NOT[request.param] is not None:
        pytest.skip(f"{request.param} cannot handle this GPU: {WHY_NOT[request.param]}")
    return str(request.param)
