"""What is measured: the operations, when they clip, and which passes over memory they cannot avoid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter

from benchmarks.machine import Bandwidths, Call

# Gradients are drawn with this standard deviation, so that CLIP_VALUES touch none of them (128 standard
# deviations) or all but 0.1 % of them (2^-10 of one). Powers of two are exact in every dtype.
GRADIENT_STD = 2.0**-7
CLIP_VALUES = {"unclipped": 1.0, "clipped": 2.0**-17}
# max_norm as a multiple of the true norm, so far from it that no rounding decides whether a call clips.
# A factor of 0.5 would be exact in every dtype and hide an error of the coefficient; 0.6 is not exact.
MAX_NORM_FACTORS = {"unclipped": 2.0, "clipped": 0.6}
# No gradient has a norm this small, except a few with one element.
_SMALL_NORM = 0.6 * 2.0**-20
# For adaptive_clip_grad_, where weights have about the norms of gradients. Units whose norm is below
# ADAPTIVE_EPS may stay as they are.
CLIP_FACTORS = {"unclipped": 128.0, "clipped": 0.6 * 2.0**-10}
ADAPTIVE_EPS = 1e-3

# Functions that torch.nn.utils does not have; contenders.py puts torch's operations together for them.
STATS = "get_grad_stats"
PER_TENSOR = "clip_grad_norm_+per_tensor"
ADAPTIVE = "adaptive_clip_grad_"
BEYOND_TORCH = (STATS, PER_TENSOR, ADAPTIVE)
# The ``op`` of a record ends with this if AdamW's step follows the clipping.
STEP = "+adamw"


@dataclass(frozen=True)
class Operation:
    """One public function in one state.

    Args:
        function: its name, in torch.nn.utils and in gradclip_ext, and after a plus the option that is set.
        state: "clipped" if (nearly) every element has to change, else "unclipped".
        reads: passes over the gradients that only read.
        updates: passes that read and write back.
        with_step: AdamW's step follows, and both are timed together, on gradients as backward leaves
            them: in new tensors, just written.
        reads_weights: one of the reads is of the weights.

    No implementation can avoid these passes if the gradients do not fit in cache. If they fit, a call may be
    faster than the bound that is computed from the passes.
    """

    function: str
    state: str
    reads: int
    updates: int
    with_step: bool = False
    reads_weights: bool = False

    @property
    def name(self) -> str:
        """The ``op`` of a record."""
        return self.function + STEP if self.with_step else self.function

    @property
    def label(self) -> str:
        """What ``--ops`` calls it."""
        return f"{self.name}:{self.state}"

    def threshold(self, norm: float) -> float | None:
        """Return the second argument for gradients of this norm, or None if there is none."""
        if self.function == "clip_grad_norm_":
            return MAX_NORM_FACTORS[self.state] * norm
        if self.function == "clip_grad_value_":
            return CLIP_VALUES[self.state]
        if self.function == PER_TENSOR:
            return MAX_NORM_FACTORS[self.state] * norm if self.state == "unclipped" else _SMALL_NORM
        return CLIP_FACTORS[self.state] if self.function == ADAPTIVE else None

    def bind(self, function: Callable[..., Any], parameters: Sequence[Parameter], norm: float) -> Call:
        """Return the call with its arguments ready, so that timing it times nothing else."""
        threshold = self.threshold(norm)
        if threshold is not None:
            return lambda: function(parameters, threshold)
        listed = parameters if self.function == STATS else [p.grad for p in parameters]
        return lambda: function(listed)

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
    # AdamW reads the gradients, and updates the weights and two moments of the same size.
    Operation("clip_grad_norm_", "unclipped", reads=2, updates=3, with_step=True),
    Operation("clip_grad_norm_", "clipped", reads=2, updates=4, with_step=True),
    Operation(STATS, "unclipped", reads=1, updates=0),
    # A gradient that fits in cache is scaled there after its norm is known.
    Operation(PER_TENSOR, "unclipped", reads=1, updates=0),
    Operation(PER_TENSOR, "clipped", reads=0, updates=1),
    Operation(ADAPTIVE, "unclipped", reads=2, updates=0, reads_weights=True),
    Operation(ADAPTIVE, "clipped", reads=1, updates=1, reads_weights=True),
)
FUNCTIONS = tuple(dict.fromkeys(operation.function for operation in OPERATIONS))
