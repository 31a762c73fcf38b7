"""The implementations that are measured: torch.nn.utils, the backends of gradclip_ext, and other libraries.

Where torch.nn.utils has no such function, what one writes with torch's operations stands under its name.

Other libraries, the peers, are measured if they are installed; none of them is a dependency. There is one
function per peer, which imports the library, returns its Implementation, and raises Missing with the reason
if it cannot be measured here. If a library does not offer what torch.nn.utils has, the results have a row
that says so.
The gate checks the results of all implementations.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import gradclip_ext
from benchmarks import compositions
from benchmarks.cases import grads
from benchmarks.operations import ADAPTIVE, ADAPTIVE_EPS, BEYOND_TORCH, FUNCTIONS, PER_TENSOR, STATS
from gradclip_ext import backends

BASELINE = "torch.nn.utils"
LOOP = f"{BASELINE}[loop]"
_OURS = "gradclip_ext["


@dataclass(frozen=True)
class Implementation:
    """One way to clip.

    Args:
        name: the ``impl`` of a record.
        functions: the ``function`` of an operation to a function with its leading arguments.
        version: of another library; None for torch and ours, which the machine block has.
        note: its limits, for people.
    """

    name: str
    functions: Mapping[str, Callable[..., Any]]
    version: str | None = None
    note: str = ""

    @property
    def is_ours(self) -> bool:
        return is_ours(self.name)

    def is_measured(self, function: str) -> bool:
        """Tell whether the results have a row for it."""
        return function in self.functions or function not in BEYOND_TORCH


def is_ours(name: str) -> bool:
    """Tell a backend of gradclip_ext by the ``impl`` of its records."""
    return name.startswith(_OURS)


def available(device: torch.device) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Return what can be measured on this device by name, and for the rest the reason why not."""
    found = [
        Implementation(BASELINE, _functions(torch.nn.utils) | _TORCH_BEYOND),
        Implementation(LOOP, _functions(torch.nn.utils, foreach=False), note="one tensor at a time"),
    ]
    missing = {}
    for backend_name, backend in backends.ALL.items():
        name = f"{_OURS}{backend_name}]"
        reason = backend.why_unavailable(device)
        if reason is None:
            found.append(Implementation(name, _our_functions(backend_name)))
        else:
            missing[name] = reason
    for name, peer in PEERS.items():
        try:
            found.append(peer(device))
        except Missing as error:
            missing[name] = str(error)
        except ModuleNotFoundError as error:
            missing[name] = f"{error.name} is not installed"
        except Exception as error:  # a library built for another torch raises anything on import
            missing[name] = f"it cannot be imported: {type(error).__name__}: {error}"
    return {implementation.name: implementation for implementation in found}, missing


def full_name(name: str) -> str:
    """Return the name in a record for the short one a person types: torch, loop or a backend's name."""
    short = {"torch": BASELINE, "loop": LOOP}
    if name in short:
        return short[name]
    return f"{_OURS}{name}]" if name in backends.ALL else name


def _functions(module: ModuleType, **fixed: Any) -> dict[str, Callable[..., Any]]:
    return {name: partial(getattr(module, name), **fixed) for name in FUNCTIONS if name not in BEYOND_TORCH}


_TORCH_BEYOND: dict[str, Callable[..., Any]] = {
    STATS: compositions.get_grad_stats,
    PER_TENSOR: compositions.clip_each_,
    ADAPTIVE: partial(compositions.adaptive_clip_grad_, eps=ADAPTIVE_EPS),
}


def _our_functions(backend: str) -> dict[str, Callable[..., Any]]:
    clip_each_ = partial(gradclip_ext.clip_grad_norm_, per_tensor=True, backend=backend)
    return _functions(gradclip_ext, backend=backend) | {
        STATS: partial(gradclip_ext.get_grad_stats, backend=backend),
        PER_TENSOR: clip_each_,
        ADAPTIVE: partial(gradclip_ext.adaptive_clip_grad_, eps=ADAPTIVE_EPS, backend=backend),
    }


# ---------------------------------------------------------------- peers


class Missing(Exception):
    """A library cannot be measured here; the message says why."""


def apex(device: torch.device) -> Implementation:
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


def transformer_engine(device: torch.device) -> Implementation:
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
        gradients = grads(parameters)
        norm = get_total_norm(gradients)
        clip_coef = max_norm / (norm + 1e-6)
        if scale_by_tensor is not None:
            clip_coef = clip_coef.clamp(max=1.0)
            for group in _by_dtype(gradients):
                apply(scale_by_tensor, flag(), [group, group], clip_coef)
        elif not (coef := clip_coef.item()) >= 1.0:  # written so that NaN scales, too
            for group in _by_dtype(gradients):
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


def deepspeed(device: torch.device) -> Implementation:
    """DeepSpeed's clipping as its bfloat16 optimizer calls it, on one rank."""
    utils = importlib.import_module("deepspeed.runtime.utils")
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator().device_name()
    if accelerator != device.type:
        raise Missing(f"it is set up for {accelerator} (DS_ACCELERATOR={device.type} changes that)")

    def clip_grad_norm_(parameters: Sequence[Parameter], max_norm: float) -> Tensor:
        norm: Tensor = utils.clip_tensors_by_global_norm(grads(parameters), max_norm)
        return norm

    return _peer(
        "deepspeed",
        {"clip_grad_norm_": clip_grad_norm_, "get_total_norm": utils.get_global_norm_of_tensors},
        "one tensor at a time, and the host waits for the norm; a NaN becomes the norm -1",
    )


def nemo_automodel(device: torch.device) -> Implementation:
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


PEERS = {
    "apex": apex,
    "transformer_engine": transformer_engine,
    "deepspeed": deepspeed,
    "nemo_automodel": nemo_automodel,
}


def _peer(name: str, functions: dict[str, Callable[..., Any]], note: str) -> Implementation:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:  # a build from a checkout, on the path only
        version = getattr(importlib.import_module(name), "__version__", "unknown")
    return Implementation(name, functions, version, note)


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
