"""CUDA GPUs that the compiled module has no code for: the reason, and one warning."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from gradclip_ext import _extension
from gradclip_ext.backends.compiled import CudaBackend


@pytest.fixture
def gpu_with_reason(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[str, bool] | None], None]:
    """Pretend a GPU of compute capability 7.0 and a build for CUDA that cannot run on it for a reason."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(_extension, "BUILT_FOR_CUDA", "13.0")
    monkeypatch.setattr(_extension, "ARCHITECTURES", "8.0;9.0")

    def pretend(reason: tuple[str, bool] | None) -> None:
        compiled = SimpleNamespace(cuda_norm=None, cuda_why_unavailable=lambda index: reason)
        monkeypatch.setattr(_extension, "C", compiled)

    return pretend


def test_a_gpu_without_code_in_the_binary_warns_once(
    gpu_with_reason: Callable[[tuple[str, bool] | None], None],
) -> None:
    gpu_with_reason(("no kernel image is available", True))
    backend = CudaBackend()
    with pytest.warns(RuntimeWarning, match="compute capability 7.0") as warned:
        reasons = {backend.why_unavailable(torch.device(d)) for d in ("cuda", "cuda:0", "cuda")}
    assert len(warned) == 1 and len(reasons) == 1
    (reason,) = reasons
    assert reason is not None and 'TORCH_CUDA_ARCH_LIST="7.0"' in reason and "8.0;9.0" in reason


def test_a_gpu_too_old_for_any_build_gets_no_advice_to_rebuild(
    gpu_with_reason: Callable[[tuple[str, bool] | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_with_reason(("no kernel image is available", True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    with pytest.warns(RuntimeWarning, match=r"6\.1 .*the kernels need 7\.0"):
        assert "reinstall" not in str(CudaBackend().why_unavailable(torch.device("cuda")))


def test_kernels_that_cannot_be_loaded_now_give_no_advice_to_rebuild(
    gpu_with_reason: Callable[[tuple[str, bool] | None], None],
) -> None:
    gpu_with_reason(("out of memory", False))
    backend = CudaBackend()
    reason = backend.why_unavailable(torch.device("cuda"))
    assert reason is not None and "out of memory" in reason and "reinstall" not in reason
    gpu_with_reason(None)
    assert backend.why_unavailable(torch.device("cuda")) is None
