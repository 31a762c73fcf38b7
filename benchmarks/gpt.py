"""GPT-2 in plain PyTorch, at its own size or small, and the text it is trained on, byte by byte."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

BYTES = 256
# More bytes than a short training run sees; they are read in less than a second.
_MAX_TEXT = 4 << 20


@dataclass(frozen=True)
class Shape:
    """Size of the model.

    Args:
        vocabulary: rows of the embedding. The text is bytes, so only the first 256 are ever
            used; the gradient of the others is as large and as dense as in any training.
        context: bytes the model looks back on.
        width: of the residual stream.
        heads: of the attention; divides ``width``.
        layers: blocks of attention and MLP.
    """

    vocabulary: int
    context: int
    width: int
    heads: int
    layers: int


SHAPES = {
    "small": Shape(vocabulary=BYTES, context=64, width=128, heads=4, layers=2),
    "gpt2-124m": Shape(vocabulary=50257, context=1024, width=768, heads=12, layers=12),
}


class Block(nn.Module):
    """Causal self-attention and an MLP, each normalised before and added to the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(shape.width)
        self.query_key_value = nn.Linear(shape.width, 3 * shape.width)
        self.projection = nn.Linear(shape.width, shape.width)
        self.norm_mlp = nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        split = self.query_key_value(self.norm_attention(x)).view(batch, time, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, time, width))
        mixed: Tensor = x + self.mlp(self.norm_mlp(x))
        return mixed


class GPT(nn.Module):
    """Predicts the next byte of a text; the head shares its weight with the embedding, as in GPT-2."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.apply(_initialise)

    def forward(self, text: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats per byte, of predicting ``text[:, 1:]``."""
        inputs, targets = text[:, :-1], text[:, 1:]
        x = self.token(inputs) + self.position.weight[: inputs.shape[1]]
        logits = functional.linear(self.norm(self.blocks(x)), self.token.weight)
        # In float32 for weights of any dtype: a bfloat16 loss has three digits.
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _initialise(module: nn.Module) -> None:
    # GPT-2's own: with PyTorch's embeddings of variance 1, a shared head would start far from uniform.
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def read_text(path: Path | None) -> Tensor:
    """Return a text as bytes: the file's, or by default the sources of Python's standard library.

    Raises:
        ValueError: there is no such file, or no standard library in source form.
    """
    if path is not None:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ValueError(f"--text {path} cannot be read: {error.strerror}") from error
    else:
        text = b""
        for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text += source.read_bytes()
        if not text:
            raise ValueError("Python's standard library is not there as source files: pass --text FILE")
    return torch.frombuffer(bytearray(text[:_MAX_TEXT]), dtype=torch.uint8)


class Batches:
    """Random excerpts of a text, the same ones for the same seed.

    Args:
        text: bytes, as read_text returns them.
        context: length of an excerpt, plus one byte to predict.
        batch: excerpts at a time.
        seed: of the choice.
    """

    def __init__(self, text: Tensor, context: int, batch: int, seed: int) -> None:
        if len(text) <= context:
            size = context + 1
            raise ValueError(
                f"the text has {len(text)} bytes, but one excerpt takes {size}: pass a longer one"
            )
        self._text, self._context, self._batch = text, context, batch
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> Tensor:
        """Return ``[batch, context + 1]`` as int64."""
        last = len(self._text) - self._context - 1
        starts = torch.randint(last + 1, (self._batch, 1), generator=self._generator)
        return self._text[starts + torch.arange(self._context + 1)].long()
