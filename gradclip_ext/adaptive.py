"""Adaptive gradient clipping: every unit of a gradient beside the same unit of its weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip_ext import arguments, calls
from gradclip_ext.backends import Selection
from gradclip_ext.checks import is_flattened
from gradclip_ext.gradient_list import GradientList
from gradclip_ext.gradients import as_plain, holds_dtensor, is_dispatch_subclass, read_gradients
from gradclip_ext.interception import is_intercepted
from gradclip_ext.norms import AdaptiveRule
from gradclip_ext.segments import listed_once


@calls.profiled
def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor],
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: float = 2.0,
    *,
    backend: str | None = None,
) -> None:
    """Scale each unit of a gradient in place so that its norm is at most a fraction of its weight's norm.

    A unit is a slice along dimension 0 (the weights of one output), or the whole tensor below two dimensions.
    With ``limit = clip_factor * max(weight_norm, eps)``, a unit whose norm is not below the limit is
    multiplied by ``limit / max(norm, 1e-6)``. Equivalent to ``timm.utils.agc.adaptive_clip_grad``, with norms
    accumulated in float64 and one read of weights and gradients. As there, leave out the last layer.

    Args:
        parameters: a tensor or an iterable of tensors whose ``.grad`` is clipped; those without a gradient
            are skipped, one listed twice counts once. Weight and gradient may differ in dtype.
        clip_factor: largest allowed ratio of a gradient's norm to its weight's, 0 or more.
        eps: the least that counts as a weight's norm, 0 or more, so that a zero weight can still move.
        norm_type: order p of the norms.
        backend: as in :func:`clip_grad_norm_`. Where dimension 0 is not the outermost in memory (a
            transposed weight; channels_last is fine), ``"foreach"`` handles a parameter.

    Raises:
        TypeError: as :func:`clip_grad_norm_`.
        ValueError: clip_factor or eps is negative or NaN; the backend does not exist.
        RuntimeError: a gradient is expanded, or its shape differs from its weight's.
        NotImplementedError: a DTensor is divided otherwise than along dimension 0, or still has to be summed
            over ranks; FSDP1 manages a parameter; a tensor of another subclass that dispatches by itself.

    Note:
        No exception changes any gradient. Never synchronises, but once for DTensors as :func:`get_grad_stats`
        does. Of DTensors each rank clips the units that it has, without communication. But one of one
        dimension that is divided (a bias, a norm's weight) is a single unit: the norms of T' of these on a
        mesh take four all-reduces of T' numbers, and all ranks of it need the same ones in the same order.
        Deterministic. A NaN makes its unit NaN, an infinity makes the finite elements of its unit
        0; other units do not notice. A NaN in a weight makes that unit of the gradient NaN.

    Examples:
        >>> weight = torch.nn.Parameter(torch.ones(2, 4))
        >>> weight.grad = torch.tensor([[1.0], [0.001]]).expand(2, 4).clone()
        >>> adaptive_clip_grad_([weight], clip_factor=0.1)
        >>> weight.grad[:, 0]
        tensor([0.1000, 0.0010])

    References:
        Brock, De, Smith and Simonyan, "High-performance large-scale image recognition without
        normalization", ICML 2021 (arXiv:2102.06171), equation 3.
    """
    listed = arguments.as_list("parameters", parameters)
    factor, least = arguments.as_threshold("clip_factor", clip_factor), arguments.as_threshold("eps", eps)
    rule = AdaptiveRule(arguments.as_float("norm_type", norm_type), factor, least)
    with torch.no_grad():
        once = listed_once(listed)
        if any(map(is_flattened, once)):
            raise NotImplementedError(
                "adaptive_clip_grad_: FSDP1 flattens the parameters, so no rank has whole slices: use "
                "fully_shard"
            )
        selection = Selection(backend, None, is_intercepted())
        if not holds_dtensor(once) or torch.compiler.is_compiling():
            gradients, weights = _read(once, selection)
            calls.count("adaptive_clip_grad_", gradients, selection)
        else:
            from gradclip_ext import distributed  # noqa: PLC0415  (importing torch's DTensor takes a second)

            cut, others = distributed.set_apart_cut_units(once)
            error: Exception | None = None
            try:
                gradients, weights = _read(others, selection)
                calls.count("adaptive_clip_grad_", gradients, selection)
            except Exception as caught:
                error = caught  # raised after the norms that other ranks wait for
            for sharded, coefs in distributed.cut_units(cut, rule, selection, error):
                sharded.scale_(coefs)
        if gradients.tensors:
            gradients.clip_adaptive_(weights, rule)


def _read(parameters: list[Any], selection: Selection) -> tuple[GradientList, Sequence[Tensor]]:
    """Return the gradients of parameters whose units each lie on one rank, and this rank's weights."""
    gradients = read_gradients(parameters, selection)
    weights = parameters
    if gradients is None or len(gradients.tensors) < len(parameters):
        weights = [p for p in parameters if p.grad is not None]
    if gradients is not None and gradients.is_sharded:
        from gradclip_ext import _dtensors  # noqa: PLC0415  (importing torch's DTensor takes a second)

        weights = _dtensors.weights_with_whole_units(weights, [p.grad for p in weights])
    if gradients is None or any(map(is_dispatch_subclass, weights)):
        raise NotImplementedError(
            "adaptive_clip_grad_: not supported for tensors that dispatch by themselves (FakeTensor, or "
            "DTensors under torch.compile): clip outside of the compiled function, or leave them out"
        )
    weights = as_plain(weights)
    for index, (grad, weight) in enumerate(zip(gradients.tensors, weights)):
        if grad.shape != weight.shape:
            raise RuntimeError(
                f"gradient {index} has shape {tuple(grad.shape)} and its weight {tuple(weight.shape)}: "
                "adaptive clipping compares them slice by slice, so they have to be alike"
            )
    return gradients, weights
