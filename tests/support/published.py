"""The published rules of gradclip_ext.thresholds in plain Python floats, for finite norms above 0."""

from __future__ import annotations

import math
from collections.abc import Sequence


class ZClip:
    """arXiv:2504.02507: the norms of the warm-up are collected in a list, which gives mean and variance."""

    def __init__(
        self,
        max_norm: float = 1.0,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        warmup_steps: int = 25,
        clip_factor: float = 1.0,
        eps: float = 1e-6,
    ) -> None:
        self.max_norm, self.alpha, self.z_thresh = max_norm, alpha, z_thresh
        self.warmup_steps, self.clip_factor, self.eps = warmup_steps, clip_factor, eps
        self.collected: list[float] = []
        self.mean = self.var = 0.0

    def __call__(self, norm: float) -> float:
        if len(self.collected) < self.warmup_steps:
            self.collected.append(norm)
            count = len(self.collected)
            self.mean = math.fsum(self.collected) / count
            self.var = math.fsum((x - self.mean) ** 2 for x in self.collected) / count
            return self.max_norm
        std = self.var**0.5
        z = (norm - self.mean) / (std + self.eps)
        value, limit = norm, self.max_norm
        if z > self.z_thresh:
            value = (self.mean + self.z_thresh * std / (z / self.z_thresh)) * self.clip_factor
            limit = min(value, self.max_norm)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * value
        self.var = self.alpha * self.var + (1 - self.alpha) * (value - self.mean) ** 2
        return limit


class AutoClip:
    """arXiv:2007.14469, of the last norms: numpy.percentile of a list that has the current norm."""

    def __init__(self, percentile: float = 10.0, window: int = 1024) -> None:
        self.percentile, self.window = percentile, window
        self.norms: list[float] = []

    def __call__(self, norm: float) -> float:
        self.norms = [*self.norms, norm][-self.window :]
        ordered, last = sorted(self.norms), len(self.norms) - 1
        position = last * (self.percentile / 100.0)
        below = math.floor(position)
        low, high, t = ordered[below], ordered[min(below + 1, last)], position - below
        return low + (high - low) * t if t < 0.5 else high - (high - low) * (1 - t)


class AdaGC:
    """arXiv:2502.11034; returns the norms after clipping."""

    def __init__(
        self,
        size: int,
        max_norm: float = 1.0,
        ratio: float = 1.05,
        beta: float = 0.98,
        warmup_steps: int = 100,
    ) -> None:
        self.max_norm, self.ratio, self.beta, self.warmup_steps = max_norm, ratio, beta, warmup_steps
        self.step = 0
        self.averages = [0.0] * size

    def __call__(self, norms: Sequence[float]) -> list[float]:
        self.step += 1
        if self.step <= self.warmup_steps:
            coef = min(1.0, self.max_norm / math.hypot(*norms))
            clipped = [coef * norm for norm in norms]
            self.averages = [c if self.step == 1 else min(a, c) for a, c in zip(self.averages, clipped)]
            return clipped
        clipped = [norm * min(1.0, self.ratio * a / norm) for norm, a in zip(norms, self.averages)]
        self.averages = [self.beta * a + (1 - self.beta) * c for a, c in zip(self.averages, clipped)]
        return clipped


class SpikeDetector:
    """SkipStepOptimizer of OLMo-core, for one value instead of loss and norm: whether it skips the step."""

    def __init__(self, sigma_factor: float = 6.0, window: int = 128) -> None:
        self.sigma_factor, self.window = sigma_factor, window
        self.norms: list[float] = []

    def __call__(self, norm: float) -> bool:
        self.norms = [*self.norms, norm][-(self.window + 1) :]
        if len(self.norms) < max(2, self.window // 2):
            return False
        before = self.norms[:-1]
        mean = math.fsum(before) / len(before)
        std = (math.fsum((x - mean) ** 2 for x in before) / (len(before) - 1)) ** 0.5
        return not (norm - mean <= self.sigma_factor * std)
