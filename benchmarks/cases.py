"""What is measured on: the parameter shapes, and random gradients of these shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.machine import Call
from benchmarks.operations import GRADIENT_STD, Operation
from gradclip_ext import reference

# ---------------------------------------------------------------- shapes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A list of gradient shapes.

    Args:
        name: what ``--cases`` calls it.
        source: where the shapes come from.
        shapes: one entry per tensor, in the order of ``model.parameters()``.
    """

    name: str
    source: str
    shapes: tuple[Shape, ...]

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def _gpt2() -> list[Shape]:
    width = 768
    block: list[Shape] = [
        (width,), (width,),  # ln_1
        (width, 3 * width), (3 * width,), (width, width), (width,),  # attn; Conv1D stores (in, out)
        (width,), (width,),  # ln_2
        (width, 4 * width), (4 * width,), (4 * width, width), (width,),  # mlp
    ]  # fmt: skip
    return [(50257, width), (1024, width), *block * 12, (width,), (width,)]


def _resnet50() -> list[Shape]:
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(blocks):
            for outputs, inputs, kernel in ((width, channels, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]
            if index == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def _vit_b16() -> list[Shape]:
    width = 768
    block: list[Shape] = [
        (width,), (width,),  # ln_1
        (3 * width, width), (3 * width,), (width, width), (width,),  # self_attention
        (width,), (width,),  # ln_2
        (4 * width, width), (4 * width,), (width, 4 * width), (width,),  # mlp
    ]  # fmt: skip
    head: list[Shape] = [(width,), (width,), (1000, width), (1000,)]
    return [(1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width), *block * 12, *head]


_LLAMA_WIDTH, _LLAMA_KV, _LLAMA_MLP, _LLAMA_VOCABULARY, _LLAMA_LAYERS = 4096, 1024, 14336, 128256, 32
_LLAMA_MATRICES: list[tuple[int, int]] = [  # (out, in) of q, k, v, o, gate, up, down
    (_LLAMA_WIDTH, _LLAMA_WIDTH),
    (_LLAMA_KV, _LLAMA_WIDTH),
    (_LLAMA_KV, _LLAMA_WIDTH),
    (_LLAMA_WIDTH, _LLAMA_WIDTH),
    (_LLAMA_MLP, _LLAMA_WIDTH),
    (_LLAMA_MLP, _LLAMA_WIDTH),
    (_LLAMA_WIDTH, _LLAMA_MLP),
]


def _llama3_8b() -> list[Shape]:
    embedding: Shape = (_LLAMA_VOCABULARY, _LLAMA_WIDTH)
    layer: list[Shape] = [*_LLAMA_MATRICES, (_LLAMA_WIDTH,), (_LLAMA_WIDTH,)]
    return [embedding, *layer * _LLAMA_LAYERS, (_LLAMA_WIDTH,), embedding]


def _lora(rank: int) -> list[Shape]:
    layer: list[Shape] = []
    for outputs, inputs in _LLAMA_MATRICES:
        layer += [(rank, inputs), (outputs, rank)]
    return layer * _LLAMA_LAYERS


def _experts() -> list[Shape]:
    width, inner = 2048 // 8, 1408 // 8
    expert: list[Shape] = [(inner, width), (inner, width), (width, inner)]
    return expert * 64 * 26


def _case(name: str, source: str, shapes: list[Shape]) -> Case:
    return Case(name, source, tuple(shapes))


_CASES = (
    _case("gpt2-124m", "GPT-2 small, huggingface.co/openai-community/gpt2, lm_head tied to wte", _gpt2()),
    _case("resnet-50", "torchvision.models.resnet50()", _resnet50()),
    _case("1x1", "synthetic: one element, where only the call costs", [(1,)]),
    _case("2000x64", "synthetic: many tiny tensors, where calls cost more than bytes", [(64,)] * 2000),
    _case("6000x32ki", "synthetic: many tensors of medium size", [(32768,)] * 6000),
    _case("vit-b-16", "torchvision.models.vit_b_16()", _vit_b16()),
    _case("lora-llama-3-8b", "LoRA r=16 on the seven matrices of each Llama-3-8B layer", _lora(16)),
    _case("moe-experts", "the routed experts of DeepSeek-V2-Lite (26 layers x 64) at 1/8 width", _experts()),
    _case("flat-1gib", "one flat buffer of 2^28 elements (1 GiB in float32): FSDP1, Megatron", [(1 << 28,)]),
    _case("llama-3-8b", "Llama-3-8B, huggingface.co/meta-llama/Meta-Llama-3-8B", _llama3_8b()),
)
CASES: dict[str, Case] = {case.name: case for case in _CASES}
DEFAULT_CASES = ("gpt2-124m", "resnet-50", "2000x64")

# ---------------------------------------------------------------- gradients

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIXED = "mixed"
DTYPES = (*_DTYPES, MIXED)

# Memory is no longer in the cache when this many times the size of the cache was accessed after it.
_CACHES = 3
# A tensor takes the host microseconds to create, and a kilobyte, so long lists get fewer copies.
_MAX_TENSORS = 16_384
# Memory that the gate and an implementation may need beyond the gradients.
_SCRATCH_BYTES = 512 << 20
# AdamW's step needs weights, two moments, new gradients, and up to two temporary lists of their size.
_STEP_COPIES = 6
# Elements converted to float64 at a time. On a CPU they are so few that torch uses one thread: thousands of
# waits for other threads take minutes on a busy machine. They are also so few that malloc reuses the memory:
# it returns larger blocks to the system, and every new block causes a page fault per 4 KiB.
_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 24}


class Workload:
    """Random gradients in one dtype: their original values, and copies that are used in turn.

    Every gradient is an allocation of its own, as from autograd. A call gets the copy that was used longest
    ago. :meth:`cool` evicts it from the cache if the other copies are too small to have done so.
    :meth:`restore` undoes a call. None of that is timed.

    Args:
        case: the shapes.
        dtype: one of DTYPES.
        device: where the gradients live.
        cache_bytes: size of the cache in which no gradients may be, see machine.cache_bytes.
        seed: of the random values.
        with_weights: whether the weights are read, too. They then have the gradients' values,
            slices along dimension 0 in reverse.
    """

    def __init__(
        self,
        case: Case,
        dtype: str,
        device: torch.device,
        cache_bytes: int,
        seed: int = 0,
        *,
        with_weights: bool = False,
    ) -> None:
        self.case = case
        self.device = device
        self.dtype = dtype
        self.bytes = gradient_bytes(case, dtype)
        copies = _copies(case, self.bytes, cache_bytes)
        random = torch.Generator(device).manual_seed(seed)
        self.original = [
            torch.empty(shape, dtype=tensor_dtype, device=device).normal_(0.0, GRADIENT_STD, generator=random)
            for shape, tensor_dtype in zip(case.shapes, dtypes_of(case, dtype))
        ]
        self._copies = [[_parameter(t, with_weights) for t in self.original] for _ in range(copies)]
        self._turn = 0
        is_cooled = device.type == "cuda" or copies * self.bytes < _CACHES * cache_bytes
        self._sweep = torch.zeros(_CACHES * cache_bytes // 4, device=device) if is_cooled else None
        self._trained: list[Parameter] = []
        self._optimizer: torch.optim.AdamW | None = None
        self.norms = [_norm(t) for t in self.original]
        self.norm = _combined(self.norms)

    def next(self) -> list[Parameter]:
        """Return the parameters of the copy that was used longest ago."""
        self._turn = (self._turn + 1) % len(self._copies)
        return self._copies[self._turn]

    def train(self) -> tuple[list[Parameter], Call]:
        """Return parameters with new gradient tensors, as backward leaves them, and an optimizer's step."""
        if self._optimizer is None:
            self._trained = [Parameter(values.clone()) for values in self.original]
            self._optimizer = torch.optim.AdamW(self._trained, foreach=True)
        self._optimizer.zero_grad()
        for parameter, values in zip(self._trained, self.original):
            parameter.grad = values.clone()
        return self._trained, self._optimizer.step

    def restore(self, parameters: Sequence[Parameter]) -> None:
        """Give the gradients of ``parameters`` their original values back."""
        for parameter, values in zip(parameters, self.original):
            if parameter.grad is None:  # an implementation that is not yet checked may do anything
                parameter.grad = torch.empty_like(values)
        # In one call: copying thousands of tensors one by one would take most of the time of a run on a GPU.
        torch._foreach_copy_(grads(parameters), self.original)

    def cool(self) -> None:
        """Evict the gradients from the cache unless the other copies have done so.

        On a GPU always: what the implementation before has written, up to 60 MB in the L2 of an H200, would
        be written back while the next one is timed, for whom 500 MB then take a tenth longer.
        """
        if self._sweep is not None:
            self._sweep.sum()


def _norm(tensor: Tensor) -> float:
    """Return the norm in float64, computed where the tensor is: the host of a GPU would take a minute for
    eight billion elements."""
    norms = [torch.linalg.vector_norm(chunk, dtype=torch.float64) for chunk in chunks(tensor)]
    return _combined(torch.stack(norms).tolist())


def _combined(norms: Iterable[float]) -> float:
    return reference.total_norm([torch.tensor(list(norms), dtype=torch.float64)])


def grads(parameters: Iterable[Parameter]) -> list[Tensor]:
    """Return the gradients of the parameters that have one."""
    return [p.grad for p in parameters if p.grad is not None]


def dtypes_of(case: Case, dtype: str) -> list[torch.dtype]:
    """Return the dtype of every tensor.

    ``mixed`` is as in bfloat16 training that keeps norm layers in float32: vectors are float32, the rest is
    bfloat16. If that gives a single dtype, every other tensor is float32.
    """
    if dtype != MIXED:
        return [_DTYPES[dtype]] * case.tensors
    is_float32 = [len(shape) == 1 for shape in case.shapes]
    if len(set(is_float32)) == 1:
        is_float32 = [index % 2 == 1 for index in range(case.tensors)]
    return [torch.float32 if kept else torch.bfloat16 for kept in is_float32]


def gradient_bytes(case: Case, dtype: str) -> int:
    """Return the size of all gradients together."""
    dtypes = dtypes_of(case, dtype)
    return sum(math.prod(shape) * kind.itemsize for shape, kind in zip(case.shapes, dtypes))


def why_not_measurable(
    case: Case, dtype: str, operation: Operation, cache_bytes: int, free_bytes: int | None
) -> str | None:
    """Return why the operation cannot be measured on the case in this dtype, or None if it can."""
    if dtype == MIXED and case.tensors == 1:
        return "a single tensor has a single dtype"
    size = gradient_bytes(case, dtype)
    copies = _copies(case, size, cache_bytes)
    needed = (copies + 1) * size + _CACHES * cache_bytes + _SCRATCH_BYTES
    what = "it"
    if operation.reads_weights:
        needed += copies * size
        what = operation.name
    if operation.with_step:
        needed += _STEP_COPIES * size
        what = operation.name
    if free_bytes is not None and needed > free_bytes:
        return f"{what} needs {needed / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are free"
    return None


def chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield flat parts of the tensor that are small enough to be converted to float64."""
    yield from tensor.view(-1).split(_CHUNK[tensor.device.type])


def _copies(case: Case, size: int, cache_bytes: int) -> int:
    enough = -(-_CACHES * cache_bytes // size)
    return max(1, min(enough, _MAX_TENSORS // case.tensors))


def _parameter(values: Tensor, with_weights: bool) -> Parameter:
    # Where the weights are not read, one element is enough for all of them.
    parameter = Parameter(values.flip(0) if with_weights else values.new_zeros(()).expand(values.shape))
    parameter.grad = values.clone()
    return parameter
