"""Inputs the tests share: seeds, dtypes, layouts, containers, and the backends under test."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import pytest
import torch
from oracle import parameter, unchanged
from torch import Tensor

import gradclip_ext
from gradclip_ext import _extension, backends

# New inputs at every run. The environment carries the seed to subprocesses and xdist workers.
SEED = int(os.environ.setdefault("GRADCLIP_EXT_TEST_SEED", str(secrets.randbelow(2**31))))

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
REAL_DTYPES = DTYPES[:-1]
NORM_TYPES = (0.0, 0.5, 1.0, 2.0, 3.0, math.inf, -math.inf)

seeded = hypothesis.seed(SEED)


def name_of(value: object) -> str:
    """Return a test id for a dtype or a number."""
    return str(value).removeprefix("torch.")


over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
over_real_dtypes = pytest.mark.parametrize("dtype", REAL_DTYPES, ids=name_of)
over_norm_types = pytest.mark.parametrize("norm_type", NORM_TYPES, ids=name_of)


needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without torch.distributed or without gloo",
)


# ---------------------------------------------------------------- tensors


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Return values of both signs spread over about three decades, none of them zero."""
    if dtype.is_complex:
        part = torch.float64 if dtype == torch.complex128 else torch.float32
        return torch.complex(random(*shape, dtype=part), random(*shape, dtype=part)).to(device)
    sign = torch.randint(0, 2, shape).mul(2).sub(1)
    return (sign * torch.exp(torch.empty(shape).uniform_(-4.0, 3.0))).to(dtype=dtype, device=device)


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": lambda **kw: random(37, 5, **kw),
    "transposed": lambda **kw: random(7, 11, **kw).t(),
    "channels_last": lambda **kw: random(2, 3, 4, 5, **kw).to(memory_format=torch.channels_last),
    "strided slice": lambda **kw: random(9, 8, **kw)[1::2, ::3],
    "0-d": random,
    "zero-size": lambda **kw: random(0, 3, **kw),
}

CONTAINERS: dict[str, Callable[[Sequence[Any]], Any]] = {
    "single tensor": lambda tensors: tensors[0],
    "list": list,
    "generator": lambda tensors: (t for t in tensors),
    "dict.values()": lambda tensors: dict(enumerate(tensors)).values(),
}


def layout_cases(**options: Any) -> Iterator[tuple[str, str, list[Tensor]]]:
    """Yield (layout, container, gradients) for every pair; other layouts stand beside the irregular one."""
    for layout, make in LAYOUTS.items():
        for container in CONTAINERS:
            if container == "single tensor":
                yield layout, container, [make(**options)]
            else:
                yield layout, container, [make(**options), random(13, **options), make(**options)]


def parameters(*shapes: tuple[int, ...], **options: Any) -> list[torch.nn.Parameter]:
    """Return one parameter with a random gradient for every shape."""
    return [parameter(random(*shape, **options)) for shape in shapes]


@contextlib.contextmanager
def gpu_waits_are_errors() -> Iterator[None]:
    """Let torch raise wherever the host would wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def grads_of(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


# ---------------------------------------------------------------- errors


def raises_untouched(
    error: type[Exception],
    words: tuple[str, ...],
    good: list[Tensor],
    call: Callable[..., Any],
    *args: Any,
    what: str = "",
) -> None:
    """Assert that the call raises, that its message holds all the words, and that nothing changed."""
    with unchanged(grads_of(good), what), pytest.raises(error) as caught:
        call(*args)
    message = str(caught.value)
    assert type(caught.value) is error, f"{what}: {caught.value!r}"
    for word in words:
        assert re.search(word, message, re.IGNORECASE), f"{what}: no {word!r} in {message!r}"


# ---------------------------------------------------------------- backends


@dataclasses.dataclass(frozen=True)
class Target:
    """The target of a test: a backend, a device, and how the backend is used.

    ``way`` is "" for the ordinary one; "loop" passes foreach=False; "blind" hides the values
    of CPU tensors from the foreach backend, so that the strategy for accelerators runs without one;
    "columns" lets Python read the tensors for the kernels, as under torch < 2.10.
    """

    name: str
    device: str
    way: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.name, self.device, self.way)))

    @property
    def sees_values(self) -> bool:
        """Whether the host may look at the gradients, as it does on the CPU."""
        return self.device == "cpu" and self.way != "blind"

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        needs = {"gpu": self.device == "cuda", "triton": self.name == "triton"}
        return [getattr(pytest.mark, mark) for mark, needed in needs.items() if needed]

    @property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"backend": self.name}
        return {**options, "foreach": False} if self.way == "loop" else options

    @property
    def clip_grad_norm_(self) -> Callable[..., Tensor]:
        return functools.partial(gradclip_ext.clip_grad_norm_, **self.options)

    @property
    def get_total_norm(self) -> Callable[..., Tensor]:
        return functools.partial(gradclip_ext.get_total_norm, **self.options)

    @property
    def clip_grads_with_norm_(self) -> Callable[..., None]:
        return functools.partial(gradclip_ext.clip_grads_with_norm_, **self.options)

    @property
    def get_grad_stats(self) -> Callable[..., gradclip_ext.GradStats]:
        return functools.partial(gradclip_ext.get_grad_stats, backend=self.name)

    @property
    def adaptive_clip_grad_(self) -> Callable[..., None]:
        return functools.partial(gradclip_ext.adaptive_clip_grad_, backend=self.name)

    @property
    def clip_grad_value_(self) -> Callable[..., None]:
        return functools.partial(gradclip_ext.clip_grad_value_, **self.options)

    @property
    def clamp_grad_(self) -> Callable[..., None]:
        return functools.partial(gradclip_ext.clamp_grad_, backend=self.name)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return random(*shape, dtype=dtype, device=self.device)

    def parameters(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return list(parameters(*shapes, dtype=dtype, device=self.device))

    def calls(self) -> dict[str, Callable[[Any], Any]]:
        """Return every function that changes gradients, with arguments that do change them."""
        return {
            "clip_grad_norm_": lambda params: self.clip_grad_norm_(params, 0.1),
            "clip_grad_norm_ p=inf": lambda params: self.clip_grad_norm_(params, 0.1, math.inf),
            "clip_grads_with_norm_": lambda params: self.clip_grads_with_norm_(
                params, 0.1, torch.tensor(5.0, device=self.device)
            ),
            "clip_grad_value_": lambda params: self.clip_grad_value_(params, 0.01),
            "clamp_grad_": lambda params: self.clamp_grad_(params, -0.01, 0.02),
        }


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def targets_of(name: str) -> list[Target]:
    """Return the targets at which a backend can be tested on this machine."""
    available = [d for d in devices() if backends.ALL[name].why_unavailable(torch.device(d)) is None]
    targets = [Target(name, device) for device in available]
    if name == "foreach":
        targets += [Target(name, "cpu", "loop"), Target(name, "cpu", "blind")]
    elif name == "cpu" and targets and _extension.C.CAN_READ:
        targets.append(Target(name, "cpu", "columns"))
    return targets


def targets() -> list[Any]:
    """Return one parameter per target; a backend that is unavailable here is skipped with the reason."""
    params: list[Any] = []
    for name, backend in backends.ALL.items():
        found = targets_of(name)
        params += [pytest.param(target, id=str(target), marks=target.marks) for target in found]
        if not found:
            why = "; ".join(f"{d}: {backend.why_unavailable(torch.device(d))}" for d in devices())
            params.append(
                pytest.param(None, id=name, marks=pytest.mark.skip(reason=f"{name} is unavailable: {why}"))
            )
    return params


def cpu_backends() -> list[Any]:
    """Return the names of the backends, skipping those that are not for the CPU, for use in a subprocess."""
    params: list[Any] = []
    for name, backend in backends.ALL.items():
        why = backend.why_unavailable(torch.device("cpu"))
        skip = [] if why is None else [pytest.mark.skip(reason=f"{name} is not for the CPU: {why}")]
        params.append(pytest.param(name, id=name, marks=skip))
    return params
