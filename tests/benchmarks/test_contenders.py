"""Other libraries in the benchmarks, over fakes with their interfaces: none of them is needed here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from small_case import CPU, SETTINGS, SMALL
from torch import Tensor

from benchmarks import contenders, measure
from benchmarks.contenders import available
from benchmarks.operations import BEYOND_TORCH, OPERATIONS, STEP

GPU = torch.device("cuda")  # only named: no tensor is made there


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """Let ``import name`` find a module with these attributes."""
    for part in accumulate(name.split("."), "{}.{}".format):
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
    for key, value in attributes.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)


def fake_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "apex", __version__="0.1")
    fake(monkeypatch, "apex.contrib.clip_grad", clip_grad_norm_=torch.nn.utils.clip_grad_norm_)
    fake(monkeypatch, "amp_C")


def fake_transformer_engine(monkeypatch: pytest.MonkeyPatch, *, scales_by_tensor: bool) -> None:
    def l2norm(flag: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
        assert len({t.dtype for t in lists[0]}) == 1
        return torch.stack([t.float().norm() for t in lists[0]]).norm().view(1), None

    def scale(flag: Tensor, lists: list[list[Tensor]], factor: Any) -> None:
        assert isinstance(factor, Tensor) == scales_by_tensor
        for given, out in zip(*lists):
            out.copy_(given.float() * factor)

    def apply(function: Callable[..., Any], flag: Tensor, lists: list[list[Tensor]], *rest: Any) -> Any:
        return function(flag, lists, *rest)

    fake(monkeypatch, "transformer_engine", __version__="2.9")
    module = "transformer_engine.pytorch.optimizers"
    fake(
        monkeypatch, module, multi_tensor_applier=apply, multi_tensor_l2norm=l2norm, multi_tensor_scale=scale
    )
    fake(
        monkeypatch,
        "transformer_engine_torch",
        **{"multi_tensor_scale_tensor": scale} if scales_by_tensor else {},
    )
    zeros = lambda *size, dtype, device: torch.zeros(*size, dtype=dtype)
    monkeypatch.setattr(contenders, "torch", SimpleNamespace(**{**vars(torch), "zeros": zeros}))


def fake_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    def clip(tensors: list[Tensor], max_norm: float) -> Tensor:
        norm = torch.nn.utils.get_total_norm(tensors)
        for tensor in tensors:
            tensor.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    module = "deepspeed.runtime.utils"
    norm = torch.nn.utils.get_total_norm
    fake(monkeypatch, "deepspeed", __version__="0.18")
    fake(monkeypatch, module, get_global_norm_of_tensors=norm, clip_tensors_by_global_norm=clip)
    accelerator = SimpleNamespace(device_name=lambda: "cpu")
    fake(monkeypatch, "deepspeed.accelerator", get_accelerator=lambda: accelerator)


def fake_nemo_automodel(monkeypatch: pytest.MonkeyPatch) -> None:
    def clip(max_norm: float, parts: list[Any]) -> Tensor:
        return torch.nn.utils.clip_grad_norm_([p for part in parts for p in part.parameters()], max_norm)

    fake(monkeypatch, "nemo_automodel", __version__="0.4")
    fake(monkeypatch, "nemo_automodel.components.training.utils", clip_grad_norm=clip)


FAKES = {
    "apex": (contenders.apex, GPU, fake_apex),
    "transformer_engine": (
        contenders.transformer_engine, GPU, partial(fake_transformer_engine, scales_by_tensor=True)
    ),
    "transformer_engine of old": (
        contenders.transformer_engine, GPU, partial(fake_transformer_engine, scales_by_tensor=False)
    ),
    "deepspeed": (contenders.deepspeed, CPU, fake_deepspeed),
    "nemo_automodel": (contenders.nemo_automodel, CPU, fake_nemo_automodel),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
@pytest.mark.parametrize("which", FAKES)
def test_each_is_called_as_it_wants_to_be(which: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, device, make = FAKES[which]
    make(monkeypatch)
    peer = function(device)
    assert peer.version != "unknown"
    assert peer.note
    torchs = available(CPU)[0]["torch.nn.utils"]
    for records in measure.measure_case(SMALL, dtype, OPERATIONS, [torchs, peer], SETTINGS):
        function = records[0].op.removesuffix(STEP)
        if function in BEYOND_TORCH:
            assert len(records) == 1
            continue
        _, record = records
        if function in peer.functions:
            assert record.ok, record.problem
        else:  # a row that says so, not a missing row
            assert not record.ok
            assert record.p50_us is None
            assert record.problem == f"{peer.name} has no {function}"


def test_what_cannot_be_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_deepspeed(monkeypatch)
    fake(monkeypatch, "apex.contrib.clip_grad", clip_grad_norm_=None)
    monkeypatch.setitem(sys.modules, "nemo_automodel", None)
    found, missing = available(CPU)
    assert found["deepspeed"].version == "0.18"
    assert missing["apex"] == "off a GPU it calls torch.nn.utils"
    assert missing["transformer_engine"] == "its kernels need a GPU"
    assert "nemo_automodel" in missing["nemo_automodel"]
    with pytest.raises(ModuleNotFoundError, match="amp_C"):  # without its kernels it would be torch
        contenders.apex(GPU)
    with pytest.raises(contenders.Missing, match="set up for cpu"):
        contenders.deepspeed(GPU)


def test_one_that_breaks_on_import_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def undefined_symbol(device: torch.device) -> None:
        raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setitem(contenders.PEERS, "apex", undefined_symbol)
    assert "undefined symbol" in available(CPU)[1]["apex"]
