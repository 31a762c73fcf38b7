"""The parameter shapes that are measured: those of real models, and the shapes that hurt."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
            for out, given, kernel in ((width, channels, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [(out, given, kernel, kernel), (out,), (out,)]
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
    for out, given in _LLAMA_MATRICES:
        layer += [(rank, given), (out, rank)]
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
    _case("6000x32ki", "synthetic: many middling tensors", [(32768,)] * 6000),
    _case("vit-b-16", "torchvision.models.vit_b_16()", _vit_b16()),
    _case("lora-llama-3-8b", "LoRA r=16 on the seven matrices of each Llama-3-8B layer", _lora(16)),
    _case("moe-experts", "the routed experts of DeepSeek-V2-Lite (26 layers x 64) at 1/8 width", _experts()),
    _case("flat-1gib", "one flat buffer of 2^28 elements (1 GiB in float32): FSDP1, Megatron", [(1 << 28,)]),
    _case("llama-3-8b", "Llama-3-8B, huggingface.co/meta-llama/Meta-Llama-3-8B", _llama3_8b()),
)
CASES: dict[str, Case] = {case.name: case for case in _CASES}
DEFAULT_CASES = ("gpt2-124m", "resnet-50", "2000x64")
