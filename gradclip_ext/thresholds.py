"""Thresholds that follow the norms seen so far: pass one as ``max_norm``, and save it with the checkpoint.

Each is an nn.Module whose buffers are its state, so ``state_dict()``, ``.to()`` and CUDA graphs work as for
a model. Called with a norm, it updates the state and returns the limit, all on the norm's device: the host
never waits. One of your own is a function, or a module with buffers, that does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gradclip_ext import arguments
from gradclip_ext.norms import whole, widest_dtype
from gradclip_ext.segments import listed_once

__all__ = ["AdaGC", "AutoClip", "SpikeDetector", "ZClip"]

# What clip_grad_norm_ adds to a norm before it divides by it.
EPS_OF_COEFFICIENT = 1e-6


class NormState(torch.nn.Module):
    """What is known of earlier norms: float64 buffers (float32 where a device has no float64) and a counter.

    A subclass reads the norm by :meth:`read`, and changes its buffers by :func:`_update` only: in place, so
    that a CUDA graph finds them again, and without a branch on a value, for which the host would wait.
    """

    steps: Tensor

    def __init__(self, steps: Tensor, **state: Tensor) -> None:
        super().__init__()
        for name, buffer in {"steps": steps, **state}.items():
            self.register_buffer(name, buffer)

    def read(self, norm: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """Return the norm in the dtype of the state, which is moved to the norm's device."""
        if not isinstance(norm, Tensor) or norm.is_complex():
            kind = f"a tensor of {norm.dtype}" if isinstance(norm, Tensor) else f"a {type(norm).__name__}"
            raise TypeError(
                f"{type(self).__name__} must be called with the norm, a real tensor, got {kind}: pass what "
                "clip_grad_norm_ or get_total_norm returns, or the object itself as max_norm"
            )
        if tuple(norm.shape) != shape and (shape or norm.numel() != 1):
            raise ValueError(self.explain_shape(tuple(norm.shape)))
        norm = whole(norm.detach()).reshape(shape)
        if self.steps.device != norm.device:
            if norm.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"the state of {type(self).__name__} is on {self.steps.device} and the norm on "
                    f"{norm.device}, where a CUDA graph is being captured: call .to({str(norm.device)!r}) of "
                    "the object before the capture, or call it once"
                )
            self.to(norm.device)
        return norm.to(widest_dtype(norm.device))

    def explain_shape(self, shape: tuple[int, ...]) -> str:
        return (
            f"{type(self).__name__} must be called with one norm, got shape {shape}: leave out "
            "per_tensor=True, or use AdaGC for a limit for each parameter"
        )

    def extra_repr(self) -> str:
        shown = {n: v for n, v in vars(self).items() if not n.startswith("_") and n != "training"}
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NormState:
        """Move the state as the caller asked, but never to a narrower dtype: ``model.half()`` must not."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        device = fn(torch.empty(1, dtype=torch.float32, device=self.steps.device)).device
        if device == self.steps.device:
            super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if device == buffer.device and moved is not None and moved.dtype == buffer.dtype:
                continue
            dtype = widest_dtype(device) if buffer.is_floating_point() else buffer.dtype
            # narrowed before it gets to a device that has no float64, widened where there is one
            narrowed = buffer.to(dtype) if dtype == torch.float32 else buffer
            self._buffers[name] = narrowed.to(device).to(dtype)
        return self


class ZClip(NormState):
    """Limit norms that are far above a running mean, by how many standard deviations they are above it.

    With the mean and the standard deviation of earlier norms, ``z = (norm - mean) / (std + eps)``. Where
    ``z > z_thresh``, the limit is ``clip_factor * (mean + z_thresh**2 / z * std)``, at most max_norm;
    elsewhere it is max_norm. After that ``mean = alpha * mean + (1 - alpha) * value`` and
    ``var = alpha * var + (1 - alpha) * (value - mean)**2``, where value is the norm or, if z exceeds
    z_thresh, the limit before max_norm bounds it. They begin as mean and variance of the first warmup_steps
    norms.

    Args:
        max_norm: largest limit, 0 or more; the limit during the warm-up. inf for none.
        alpha: weight of the past in the running mean and variance, from 0 to 1.
        z_thresh: how many standard deviations above the mean a norm may be, 0 or more; inf for any.
        warmup_steps: number of norms that the mean and variance begin with, 1 or more.
        clip_factor: multiplies the limit of a norm that is too far above the mean, 0 or more.
        eps: added to the standard deviation, 0 or more.

    Returns:
        When called with a norm: the limit, a 0-d float64 tensor on the norm's device (float32 where the
        device has no float64).

    Raises:
        TypeError: an argument is of the wrong kind; the norm is not a real tensor.
        ValueError: an argument is out of its range; there are several norms.
        RuntimeError: a CUDA graph is being captured while the state is on another device.

    Note:
        Does not synchronise or communicate. The state moves to the norm's device at the first call. Over many
        ranks all of them get the same limit, since they get the same norm. A NaN or infinite norm, and one
        whose square overflows, leaves the state as it was; after the warm-up the limit for it is
        ``clip_factor * mean``, at most max_norm.

    Examples:
        >>> rule = ZClip(warmup_steps=2)
        >>> [round(rule(torch.tensor(norm)).item(), 3) for norm in (0.5, 0.7, 0.6, 9.0)]
        [1.0, 1.0, 1.0, 0.607]

    References:
        Kumar, Owen, Chowdhury and Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training",
        arXiv:2504.02507.
    """

    mean: Tensor
    var: Tensor

    def __init__(
        self,
        max_norm: float = 1.0,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        warmup_steps: int = 25,
        clip_factor: float = 1.0,
        eps: float = 1e-6,
    ) -> None:
        # of shape [1]: AOT Autograd loses what is written to a 0-d float64 input (seen in torch 2.13)
        super().__init__(steps=_counter(), mean=_zeros(1), var=_zeros(1))
        self.max_norm: float = arguments.as_threshold("max_norm", max_norm)
        self.alpha: float = arguments.as_number_up_to("alpha", alpha, 1.0)
        self.z_thresh: float = arguments.as_threshold("z_thresh", z_thresh)
        self.warmup_steps: int = arguments.as_count("warmup_steps", warmup_steps, least=1)
        self.clip_factor: float = arguments.as_number_up_to("clip_factor", clip_factor)
        self.eps: float = arguments.as_number_up_to("eps", eps)

    def forward(self, norm: Tensor) -> Tensor:
        norm = self.read(norm)
        mean, var, count = self.mean[0], self.var[0], self.steps + 1
        is_finite, is_warm, std = norm.isfinite(), self.steps >= self.warmup_steps, var.sqrt()
        z = (norm - mean) / (std + self.eps)
        is_spike = is_warm & ((z > self.z_thresh) | ~is_finite)
        spread = torch.where(is_finite, std * (self.z_thresh * self.z_thresh) / z, 0.0)
        reduced = (mean + spread) * self.clip_factor
        limit = torch.where(is_spike, reduced.clamp(max=self.max_norm), self.max_norm)

        value = torch.where(is_spike, reduced, norm)
        first_mean = mean + (norm - mean) / count
        first_var = (var + (norm - mean).square() / count) * (self.steps / count.to(var.dtype))
        later_mean = self.alpha * mean + (1.0 - self.alpha) * value
        later_var = self.alpha * var + (1.0 - self.alpha) * (value - later_mean).square()
        mean, var = torch.where(is_warm, later_mean, first_mean), torch.where(is_warm, later_var, first_var)
        enters = is_finite & var.isfinite()
        _update(self.mean, enters, mean)
        _update(self.var, enters, var)
        _update(self.steps, enters, count)
        return limit


class AutoClip(NormState):
    """Limit norms to a percentile of the last norms, the current one included.

    The percentile is that of :func:`numpy.percentile`: between two norms, it is interpolated linearly. The
    published rule remembers all norms.

    Args:
        percentile: from 0 to 100; 10 means that nine of ten gradients are scaled.
        window: number of norms that are remembered, 1 or more.

    Returns:
        When called with a norm: the limit, a 0-d float64 tensor on the norm's device (float32 where the
        device has no float64).

    Raises:
        As :class:`ZClip`.

    Note:
        As :class:`ZClip`, but for NaN and infinite norms: they are not remembered, and the limit for one is
        the percentile of those that are, or 0 as long as there is none. Each call sorts the window.

    Examples:
        >>> rule = AutoClip(percentile=50.0)
        >>> [rule(torch.tensor(norm)).item() for norm in (4.0, 1.0, 2.0)]
        [4.0, 2.5, 2.0]

    References:
        Seetharaman, Wichern, Pardo and Le Roux, "AutoClip: Adaptive Gradient Clipping for Source Separation
        Networks", arXiv:2007.14469.
    """

    norms: Tensor

    def __init__(self, percentile: float = 10.0, window: int = 1024) -> None:
        window = arguments.as_count("window", window, least=1)
        super().__init__(steps=_counter(), norms=_zeros(window))
        self.percentile: float = arguments.as_number_up_to("percentile", percentile, 100.0)
        self.window = window

    def forward(self, norm: Tensor) -> Tensor:
        norm = self.read(norm)
        _remember(self, norm)
        count = self.steps.clamp(max=self.window)
        ordered = torch.where(_indices(self.norms) < count, self.norms, torch.inf).sort().values
        last = (count - 1).clamp(min=0)
        position = last.to(norm.dtype) * (self.percentile / 100.0)
        below = position.floor().long()
        low, high = ordered.gather(0, torch.stack([below, torch.minimum(below + 1, last)])).unbind()
        fraction = position - below
        # numpy's order of operations, which rounds alike
        limit = torch.where(
            fraction < 0.5, low + (high - low) * fraction, high - (high - low) * (1.0 - fraction)
        )
        return torch.where(count > 0, limit, 0.0)


class AdaGC(NormState):
    """Limit each gradient's norm to a little above its own running average; for ``per_tensor=True``.

    The limit of gradient t is ``ratio * average[t]``, and
    ``average[t] = beta * average[t] + (1 - beta) * min(norm[t], limit[t])``. During the first warmup_steps
    steps all gradients are clipped together, by their joint norm, to max_norm, and ``average[t]`` is the
    least norm that gradient t had after that.

    Args:
        parameters: those that are clipped, in the same order; one listed twice counts once. Only their number
            matters here.
        max_norm: largest joint norm during the warm-up, 0 or more; inf for any.
        ratio: how far above its average a norm may be, 0 or more; above 1, or no average can grow.
        beta: weight of the past in the averages, from 0 to 1.
        warmup_steps: 1 or more.

    Returns:
        When called with norms [T]: the limits, a float64 tensor [T] on their device (float32 where the device
        has no float64). They are raised a little to cancel the 1e-6 in ``clip_grad_norm_``'s divisor, which
        matters for the small norms of single gradients.

    Raises:
        TypeError: an argument is of the wrong kind; the norms are not a real tensor.
        ValueError: an argument is out of its range; the norms are not of T parameters.
        RuntimeError: a CUDA graph is being captured while the state is on another device.

    Note:
        As :class:`ZClip`. A norm that is NaN, infinite or 0 (no gradient) leaves the average and the warm-up
        of that gradient as they were, and has no part in the joint norm: an average of 0 would never grow
        again. The norms have to be of order 2.

    Examples:
        >>> weight, bias = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
        >>> weight.grad, bias.grad = torch.tensor([0.3, 0.4]), torch.tensor([0.1])
        >>> rule = AdaGC([weight, bias], warmup_steps=1)
        >>> clip_grad_norm_([weight, bias], rule, per_tensor=True)
        tensor([0.5000, 0.1000])
        >>> bias.grad *= 10
        >>> clip_grad_norm_([weight, bias], rule, per_tensor=True)
        tensor([0.5000, 1.0000])
        >>> bias.grad
        tensor([0.1050])

    References:
        Wang et al., "AdaGC: Improving Training Stability for Large Language Model Pretraining",
        arXiv:2502.11034.
    """

    averages: Tensor

    def __init__(
        self,
        parameters: Tensor | Iterable[Tensor],
        max_norm: float = 1.0,
        ratio: float = 1.05,
        beta: float = 0.98,
        warmup_steps: int = 100,
    ) -> None:
        listed = arguments.as_list("parameters", parameters)
        arguments.raise_if_not_tensors("parameters", listed)
        size = len(listed_once(listed))
        if not size:
            raise ValueError("parameters is empty: pass those that clip_grad_norm_ will get, in that order")
        super().__init__(steps=_counter(size), averages=_zeros(size))
        self.max_norm: float = arguments.as_threshold("max_norm", max_norm)
        self.ratio: float = arguments.as_number_up_to("ratio", ratio)
        self.beta: float = arguments.as_number_up_to("beta", beta, 1.0)
        self.warmup_steps: int = arguments.as_count("warmup_steps", warmup_steps, least=1)

    def forward(self, norms: Tensor) -> Tensor:
        norms = self.read(norms, tuple(self.steps.shape))
        averages, tiny = self.averages, torch.finfo(norms.dtype).tiny
        is_known = norms.isfinite() & (norms > 0.0)
        known = torch.where(is_known, norms, 0.0)
        largest = known.amax()
        joint = largest * torch.linalg.vector_norm(known / largest.clamp(min=tiny))  # squares cannot overflow
        is_warming = self.steps < self.warmup_steps
        jointly = torch.where(joint <= self.max_norm, self.max_norm, known * (self.max_norm / joint))
        limits = torch.where(is_warming, jointly, averages * self.ratio)

        clipped = torch.minimum(known, limits)
        least = torch.where(self.steps == 0, clipped, torch.minimum(averages, clipped))
        averages = torch.where(is_warming, least, self.beta * averages + (1.0 - self.beta) * clipped)
        _update(self.averages, is_known, averages)
        _update(self.steps, is_known, self.steps + 1)
        return torch.where(is_known, limits * (1.0 + EPS_OF_COEFFICIENT / known.clamp(min=tiny)), limits)

    def explain_shape(self, shape: tuple[int, ...]) -> str:
        size = len(self.steps)
        return (
            f"AdaGC was made for {size} parameters (a tied one counts once), and must be called with their "
            f"norms, of shape ({size},), got {shape}: pass per_tensor=True and the same parameters"
        )


class SpikeDetector(NormState):
    """Tell whether a norm is further above the mean of the last norms than a number of standard deviations.

    A norm is a spike where ``norm - mean > sigma_factor * std``, with the mean and the (unbiased) standard
    deviation of the window norms before it. Spikes are remembered, too. A finite norm is a spike only if
    ``max(2, window // 2 - 1)`` norms were before it. OLMo skips such steps.

    Args:
        sigma_factor: how many standard deviations above the mean a norm may be, 0 or more.
        window: number of norms that are remembered, 2 or more.

    Returns:
        When called with a norm: a 0-d bool tensor on the norm's device.

    Raises:
        As :class:`ZClip`.

    Note:
        As :class:`ZClip`, but for NaN and infinite norms: each of them is a spike, from the first call on,
        and is not remembered. The value may be a loss as well as a norm.

    Examples:
        >>> detector = SpikeDetector(window=8)
        >>> [detector(torch.tensor(norm)).item() for norm in (1.0, 1.1, 0.9, 1.0, 5.0, 1.0)]
        [False, False, False, False, True, False]

    References:
        Team OLMo, "2 OLMo 2 Furious", arXiv:2501.00656; SkipStepOptimizer of OLMo-core.
    """

    norms: Tensor

    def __init__(self, sigma_factor: float = 6.0, window: int = 128) -> None:
        window = arguments.as_count("window", window, least=2)
        super().__init__(steps=_counter(), norms=_zeros(window))
        self.sigma_factor: float = arguments.as_number_up_to("sigma_factor", sigma_factor)
        self.window = window

    def forward(self, norm: Tensor) -> Tensor:
        norm = self.read(norm)
        count = self.steps.clamp(max=self.window)
        mean = self.norms.sum() / count.clamp(min=1)  # slots without a norm are 0
        squares = torch.where(_indices(self.norms) < count, (self.norms - mean).square(), 0.0)
        std = (squares.sum() / (count - 1).clamp(min=1)).sqrt()
        is_within = norm - mean <= self.sigma_factor * std
        # of one norm there is no standard deviation
        is_judged = count + 1 >= max(3, self.window // 2)
        is_spike = ~norm.isfinite() | (is_judged & ~is_within)
        _remember(self, norm)
        return is_spike


def _remember(state: AutoClip | SpikeDetector, norm: Tensor) -> None:
    """Put a finite norm in the place of the oldest one."""
    is_here = _indices(state.norms) == state.steps % state.window
    is_finite = norm.isfinite()
    _update(state.norms, is_here & is_finite, norm)
    _update(state.steps, is_finite, state.steps + 1)


def _update(buffer: Tensor, where: Tensor, value: Tensor) -> None:
    """Set a buffer to a new value where the condition holds."""
    buffer.copy_(torch.where(where, value, buffer))


def _indices(buffer: Tensor) -> Tensor:
    return torch.arange(len(buffer), device=buffer.device)


# In CPU memory whatever the default device is: the first call moves them.
def _counter(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device="cpu")


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device="cpu")
