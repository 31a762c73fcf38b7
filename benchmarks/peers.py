"""Other libraries' clipping: one function each, which says what the library can do here.

Each function imports its library, returns a Peer, and raises Missing with the reason where it
cannot be measured. An operation that is not among its functions is one the library does not
offer; it gets a row that says so. None of the libraries is needed, and none is installed here:
what they return is judged by the gate like everybody's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


class Missing(Exception):
    """A library cannot be measured here; the message says why."""


class Peer(NamedTuple):
    """What a library offers: functions by operation, its version, and its limits, for people."""

    functions: Mapping[str, Callable[..., Any]]
    version: str
    note: str


def apex(device: torch.device) -> Peer:
    """NVIDIA apex's fused norm and scaling."""
    clip_grad = importlib.import_module("apex.contrib.clip_grad")
    if device.type != "cuda":
        raise Missing("off a GPU it calls torch.nn.utils")
    importlib.import_module("amp_C")  # without these kernels it silently calls torch.nn.utils
    return _peer(
        "apex",
        {"clip_grad_norm_": clip_grad.clip_grad_norm_},
        "fused for float32 and float16, tensor by tensor for bfloat16",
    )


def transformer_engine(device: torch.device) -> Peer:
    """TransformerEngine's multi-tensor norm and scaling, put together as Megatron-LM does."""
    if device.type != "cuda":
        raise Missing("its kernels need a GPU")
    optimizers = importlib.import_module("transformer_engine.pytorch.optimizers")
    kernels = importlib.import_module("transformer_engine_torch")
    apply = optimizers.multi_tensor_applier
    scale_by_tensor = getattr(kernels, "multi_tensor_scale_tensor", None)

    def flag() -> Tensor:
        return torch.zeros(1, dtype=torch.int32, device=device)

    def get_total_norm(tensors: Sequence[Tensor]) -> Tensor:
        norms = [
            apply(optimizers.multi_tensor_l2norm, flag(), [group], False)[0] for group in _by_dtype(tensors)
        ]
        norm: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.cat(norms))
        return norm.view(())

    def clip_grad_norm_(parameters: Sequence[Parameter], max_norm: float) -> Tensor:
        grads = _grads(parameters)
        norm = get_total_norm(grads)
        clip_coef = max_norm / (norm + 1e-6)
        if scale_by_tensor is not None:
            clip_coef = clip_coef.clamp(max=1.0)
            for group in _by_dtype(grads):
                apply(scale_by_tensor, flag(), [group, group], clip_coef)
        elif not (coef := clip_coef.item()) >= 1.0:  # written so that NaN scales, too
            for group in _by_dtype(grads):
                apply(optimizers.multi_tensor_scale, flag(), [group, group], coef)
        return norm

    return _peer(
        "transformer_engine",
        {"clip_grad_norm_": clip_grad_norm_, "get_total_norm": get_total_norm},
        "one dtype per kernel call, so a mixed list takes one call each; GPU only"
        + (
            ""
            if scale_by_tensor
            else "; this version scales by a number of the host, which waits for the GPU"
        ),
    )


def deepspeed(device: torch.device) -> Peer:
    """DeepSpeed's clipping as its bfloat16 optimizer calls it, on one rank."""
    utils = importlib.import_module("deepspeed.runtime.utils")
    served = importlib.import_module("deepspeed.accelerator").get_accelerator().device_name()
    if served != device.type:
        raise Missing(f"it is set up for {served} (DS_ACCELERATOR={device.type} changes that)")

    def clip_grad_norm_(parameters: Sequence[Parameter], max_norm: float) -> Tensor:
        norm: Tensor = utils.clip_tensors_by_global_norm(_grads(parameters), max_norm)
        return norm

    return _peer(
        "deepspeed",
        {"clip_grad_norm_": clip_grad_norm_, "get_total_norm": utils.get_global_norm_of_tensors},
        "one tensor at a time, and the host waits for the norm; a NaN becomes the norm -1",
    )


def nemo_automodel(device: torch.device) -> Peer:
    """NeMo Automodel's clipping, which takes the parts of a model."""
    utils = importlib.import_module("nemo_automodel.components.training.utils")

    class Part:
        def __init__(self, parameters: Sequence[Parameter]) -> None:
            self._parameters = parameters

        def parameters(self) -> Iterator[Parameter]:
            return iter(self._parameters)

    def clip_grad_norm_(parameters: Sequence[Parameter], max_norm: float) -> Tensor:
        norm: Tensor = utils.clip_grad_norm(max_norm, [Part(parameters)])
        return norm

    return _peer(
        "nemo_automodel",
        {"clip_grad_norm_": clip_grad_norm_},
        "made for sharded models; measured on one rank",
    )


ALL = {
    "apex": apex,
    "transformer_engine": transformer_engine,
    "deepspeed": deepspeed,
    "nemo_automodel": nemo_automodel,
}


def _peer(name: str, functions: dict[str, Callable[..., Any]], note: str) -> Peer:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:  # a build from a checkout, on the path only
        version = getattr(importlib.import_module(name), "__version__", "unknown")
    return Peer(functions, version, note)


def _grads(parameters: Sequence[Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
