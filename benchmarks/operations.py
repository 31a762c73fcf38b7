"""The calls that are measured, the thresholds they get, and the bytes they cannot avoid moving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter

from benchmarks.clocks import Call
from benchmarks.machine import Bandwidths

# Gradients are drawn with this standard deviation, so that CLIP_VALUES touch none of them (128
# standard deviations) or all but 0.1 % of them (2^-10 of one). Powers of two are exact in every dtype.
GRADIENT_STD = 2.0**-7
CLIP_VALUES = {"unclipped": 1.0, "clipped": 2.0**-17}
# max_norm as a multiple of the true norm: no rounding of the norm decides whether a call clips. Halves
# would be exact in every dtype, so that a coefficient off by less than a rounding would not show.
MAX_NORM_FACTORS = {"unclipped": 2.0, "clipped": 0.6}


@dataclass(frozen=True)
class Operation:
    """One public function in one state.

    Args:
        name: name of the function, in torch.nn.utils and in gradclip_ext.
        state: "clipped" if (nearly) every element has to change, else "unclipped".
        reads: passes over the gradients that only read.
        updates: passes that read and write back.

    The passes are those no implementation can do without when the gradients do not fit in
    cache; what does fit may beat the bound made from them.
    """

    name: str
    state: str
    reads: int
    updates: int

    @property
    def label(self) -> str:
        return f"{self.name}:{self.state}"

    def threshold(self, norm: float) -> float | None:
        """Return the second argument for gradients of this norm, or None if there is none."""
        if self.name == "clip_grad_norm_":
            return MAX_NORM_FACTORS[self.state] * norm
        if self.name == "clip_grad_value_":
            return CLIP_VALUES[self.state]
        return None

    def bind(self, function: Callable[..., Any], parameters: Sequence[Parameter], norm: float) -> Call:
        """Return the call with its arguments ready, so that timing it times nothing else."""
        threshold = self.threshold(norm)
        if threshold is None:
            tensors = [p.grad for p in parameters]
            return lambda: function(tensors)
        return lambda: function(parameters, threshold)

    def moved_bytes(self, size: int) -> int:
        """Return how many bytes have to move for gradients of ``size`` bytes."""
        return (self.reads + 2 * self.updates) * size

    def bound_us(self, size: int, bandwidths: Bandwidths) -> float:
        """Return the time that moving them takes at the bandwidths measured on this machine."""
        read = self.reads * size / bandwidths.read_gbps
        update = 2 * self.updates * size / bandwidths.inplace_gbps
        return (read + update) / 1e3


OPERATIONS = (
    Operation("clip_grad_norm_", "unclipped", reads=1, updates=0),
    Operation("clip_grad_norm_", "clipped", reads=1, updates=1),
    Operation("clip_grad_value_", "unclipped", reads=1, updates=0),
    Operation("clip_grad_value_", "clipped", reads=0, updates=1),
    Operation("get_total_norm", "unclipped", reads=1, updates=0),
)
NAMES = tuple(dict.fromkeys(operation.name for operation in OPERATIONS))
