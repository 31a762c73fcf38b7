"""The public clipping functions: check the arguments, read the gradients, norm, coefficient, apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradclip_ext import _torch_functions, arguments, calls
from gradclip_ext.backends import Selection
from gradclip_ext.checks import check_representable
from gradclip_ext.gradients import is_dispatch_subclass, read_gradients, read_tensors
from gradclip_ext.interception import is_intercepted
from gradclip_ext.norms import Limit, Rule, raise_if_nonfinite, whole
from gradclip_ext.per_tensor import clip_each_
from gradclip_ext.segments import Segments

if TYPE_CHECKING:  # importing these takes time that lists of plain tensors need not spend
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group = ProcessGroup | DeviceMesh

Tensors = Tensor | Iterable[Tensor]

# The functions below turn gradients off by set_grad_enabled(False), which takes half the time of no_grad().


@calls.profiled
def clip_grad_norm_(
    parameters: Tensors,
    max_norm: Limit,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    per_tensor: bool = False,
    zero_if_nonfinite: bool = False,
    backend: str | None = None,
    group: Group | Sequence[Group] | None = None,
    copies: Callable[[Any], int] | None = None,
) -> Tensor:
    """Scale gradients in place so that their joint norm is at most ``max_norm``; return the norm from before.

    The returned norm is the one **before** clipping: it exceeds ``max_norm`` where clipping acts.
    Equivalent to :func:`torch.nn.utils.clip_grad_norm_`, with the norm accumulated and returned in
    float32 (float64 as soon as one gradient is) and no write at all where nothing needs clipping
    (but for ``foreach`` on an accelerator).

    All gradients are multiplied by ``min(1, max_norm / (total_norm + 1e-6))``, where
    ``total_norm`` is the norm of all of them laid out as one vector.

    Args:
        parameters: a tensor or an iterable of tensors whose ``.grad`` is clipped; those
            without a gradient are skipped, one listed twice counts once. An exhausted
            generator warns.
        max_norm: largest allowed norm, 0 or more. ``inf`` only reports the norm. A real tensor with one
            element stays on its device: an accelerator is not waited for, so a negative value there acts
            as 0, and NaN makes all gradients NaN. A function is called with the norm (a plain 0-d
            tensor), once and only if there are gradients, and returns such a number or tensor; over
            many ranks all of them have to return the same.
        norm_type: order p of the norm: any number, ``inf`` for the largest magnitude,
            0 for the number of tensors with a nonzero element.
        error_if_nonfinite: raise instead of clipping when the norm is NaN or infinite.
        per_tensor: clip each gradient by its own norm instead of all by their joint norm. max_norm then
            may be a tensor of shape [T] with a limit for each parameter, a function gets all T norms, and
            what is said of a NaN or infinite norm applies to each gradient alone. T counts the parameters
            in the order given, a tied one once, and those without a gradient, whose norm is 0.
        zero_if_nonfinite: set all gradients to +0.0 when the norm is NaN or infinite, whatever max_norm
            is. The step is not skipped: Adam and momentum move the weights for a zero gradient, too.
        foreach: None or True lets a whole list be handled at once, False takes one tensor
            at a time; meaning and errors are torch's.
        backend: name of the backend to insist on, or None to choose by device. A gradient
            with gaps in memory or of complex dtype is handled by ``"foreach"`` whichever
            backend is named.
        group: a ProcessGroup, a DeviceMesh or a sequence of these, the same on all ranks and
            in the same order: the ranks that hold *other* gradients of the model (pipeline
            stages, experts, Megatron's tensor-parallel weights, FSDP1's shards). A plain
            gradient then is a different one on each of these ranks. None: plain gradients
            count on this rank only, and DTensors are joined over their own meshes. ``()``: as
            None, and ranks outside of a smaller mesh hold copies of its DTensors (FSDP with a
            partial tensor-parallel plan). A rank without parameters names the mesh of the
            others too, as they do: ``group=[stage_mesh, pp_mesh]``.
        copies: a function from a parameter to the number of ranks of ``group`` on which its
            gradient is the *same* (a norm's weight on all tensor-parallel ranks, an embedding
            tied across two stages), 1 for most. :func:`gradclip_ext.distributed.count_elements`
            tells whether group and copies describe the model.

    Returns:
        A new 0-d tensor on the device of the first gradient, float32 or float64. With no
        gradient at all, ``torch.tensor(0.0)``. With per_tensor, the norms of shape [T], all of one
        dtype. Where torch returns a DTensor (DTensors of one mesh, no group), a replicated DTensor.
        The same bits on all ranks whose gradients have the same dtypes.

    Raises:
        TypeError: parameters is a module, or an element or gradient is of the wrong kind
            (not a tensor, sparse, integer, float8); max_norm is neither a number, a real tensor
            nor a function, or the function returns anything else; group is not one of its types,
            or is ``GroupMember.NON_GROUP_MEMBER``.
        ValueError: max_norm is negative or NaN (where the host can see it), or a tensor of several
            elements (with per_tensor, not of T); error_if_nonfinite and zero_if_nonfinite are both set;
            with per_tensor, ranks have different numbers of parameters; the backend does not exist;
            DTensors lie on meshes over different ranks and group is None; meshes overlap and none
            holds the ranks of all; a group overlaps the ranks before it in part, or lacks this rank;
            copies returns less than 1 or more than there are, or is passed without group.
        RuntimeError: error_if_nonfinite is set and the norm is NaN or infinite (the message
            names the first tensor that is to blame, and on the other ranks says that theirs
            are finite); a gradient is expanded; foreach=True on a device without foreach
            support; group under torch.compile. No exception changes any gradient of the rank
            that raises; where only one rank raises for its gradients, all other ranks get a NaN
            norm, so that they do not wait for it.
        NotImplementedError: norm_type is 0 or a placement is not supported, among DTensors of
            several meshes, plain tensors or a group. With one mesh alone, torch's function
            handles these, but with a number as max_norm and without zero_if_nonfinite only.

    Note:
        Does not synchronise with an accelerator unless error_if_nonfinite is set, or a group
        cannot communicate on the gradients' device; runs on the current stream. A NaN gives a
        NaN norm and NaN gradients, an infinity gives norm inf and finite gradients become 0,
        as in torch; with ``max_norm=inf`` nothing is scaled. Subclasses other than DTensor
        that dispatch by themselves go to torch's function unchanged, and under torch.compile
        so do DTensors.

        Communicates only with DTensors or a group: one float64 number in one all-reduce
        over the mesh or, if that has several dimensions, over the world if these ranks are
        all of it, else over one dimension after the other. A finite norm_type outside of
        (0, 6] takes one more, for the largest (smallest) norm. Partial gradients are first
        summed, by one reduce-scatter for each dimension of a mesh, dtype and 32 MB; all ranks of that
        dimension need the same gradients in the same order. Otherwise lists may differ
        between ranks, and a rank without gradients takes part. per_tensor takes two all-reduces of T
        numbers, and the same parameters on all ranks, whose number is compared at the first call, for
        which the host waits. Over many ranks, float64
        gradients overflow where their norm to the power norm_type does.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])

    References:
        Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural
        networks", ICML 2013, algorithm 1.
    """
    listed = arguments.as_list("parameters", parameters)
    limit = arguments.as_limit(max_norm, allows_vector=bool(per_tensor))
    rule = Rule(limit, bool(error_if_nonfinite), bool(zero_if_nonfinite))
    norm_type = arguments.as_float("norm_type", norm_type)
    with torch.set_grad_enabled(False):
        selection = Selection(backend, foreach, is_intercepted())
        if per_tensor:
            return clip_each_(listed, norm_type, rule, selection, group, copies)
        gradients = read_gradients(listed, selection, norm_type=norm_type, group=group, copies=copies)
        calls.count("clip_grad_norm_", gradients, selection)
        if gradients is None:
            number = rule.as_torch_takes_it()
            return _torch_functions.clip_grad_norm_(listed, number, norm_type, error_if_nonfinite, foreach)
        if not gradients.tensors and not gradients.is_sharded:
            return torch.tensor(0.0)
        total_norm, clip_coef = gradients.norm(norm_type, rule)
        if rule.error_if_nonfinite:
            # Read again only to name a tensor: asking what is no leaf for .grad makes torch warn.
            grads = (None if p.grad is None else gradients.on_this_rank(p.grad) for p in listed)
            raise_if_nonfinite(total_norm, norm_type, grads, gradients.is_sharded)
            rule.raise_if_nan(clip_coef)
        gradients.scale_(clip_coef, rule.zero_if_nonfinite)
        return gradients.as_result(total_norm)


@calls.profiled
def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    backend: str | None = None,
    group: Group | Sequence[Group] | None = None,
    copies: Callable[[Any], int] | None = None,
) -> Tensor:
    """Return the norm of all tensors laid out as one vector.

    Takes the tensors themselves (gradients, weights, activations), not parameters, and
    only reads them. Equivalent to :func:`torch.nn.utils.get_total_norm`; arguments, result,
    errors, synchronisation and communication as in :func:`clip_grad_norm_`, except that the
    tensors' own meshes decide which ranks take part, so an empty list without ``group`` does
    not communicate, and ``copies`` gets the tensors. Expanded tensors are welcome.

    Examples:
        >>> get_total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    listed = arguments.as_list("tensors", tensors)
    rule = Rule(math.inf, bool(error_if_nonfinite))
    norm_type = arguments.as_float("norm_type", norm_type)
    with torch.set_grad_enabled(False):
        selection = Selection(backend, foreach, is_intercepted())
        given = read_tensors(listed, selection, norm_type=norm_type, group=group, copies=copies)
        calls.count("get_total_norm", given, selection)
        if given is None:
            return _torch_functions.get_total_norm(listed, norm_type, error_if_nonfinite, foreach)
        if not given.tensors and not given.is_sharded:
            return torch.tensor(0.0)
        total_norm, _ = given.norm(norm_type, rule)
        if rule.error_if_nonfinite:
            raise_if_nonfinite(total_norm, norm_type, map(given.on_this_rank, listed), given.is_sharded)
        return given.as_result(total_norm)


@calls.profiled
def clip_grads_with_norm_(
    parameters: Tensors,
    max_norm: float | Tensor,
    total_norm: Tensor,
    foreach: bool | None = None,
    *,
    zero_if_nonfinite: bool = False,
    backend: str | None = None,
) -> None:
    """Scale gradients in place by ``min(1, max_norm / (total_norm + 1e-6))``.

    The second half of :func:`clip_grad_norm_`, for a norm that was computed elsewhere, for
    instance across pipeline stages. Equivalent to
    :func:`torch.nn.utils.clip_grads_with_norm_`.

    Args:
        parameters: as in :func:`clip_grad_norm_`.
        max_norm: largest allowed norm, 0 or more; ``inf`` scales nothing. A number or a real tensor,
            with one element or, of shape [T], with a limit for each parameter.
        total_norm: real tensor on any device, with one element or, of shape [T], a norm for each
            parameter; half types and integers become float32 first. T counts the parameters in the order
            given, a tied one once, and those without a gradient. A DTensor is made whole, which
            communicates unless it is replicated. On an accelerator, a negative value acts as 0.
        foreach: as in :func:`clip_grad_norm_`.
        zero_if_nonfinite: set gradients to +0.0 where their norm is NaN or infinite.
        backend: as in :func:`clip_grad_norm_`.

    Raises:
        TypeError: total_norm is not a real tensor; otherwise as :func:`clip_grad_norm_`.
        ValueError: total_norm or max_norm has neither one nor T elements, or total_norm is negative (where
            the host can see it); otherwise as :func:`clip_grad_norm_`.
        NotImplementedError: a tensor subclass belongs to torch's function, which takes one norm and a
            number as max_norm only.

    Note:
        Synchronises only to bring a total_norm or max_norm from an accelerator to gradients on the
        CPU. Of DTensors each rank scales its own part, without communication.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_grads_with_norm_([weight], max_norm=1.0, total_norm=torch.tensor(10.0))
        >>> weight.grad
        tensor([0.3000, 0.4000])
    """
    listed = arguments.as_list("parameters", parameters)
    limit = arguments.as_limit(max_norm, allows_function=False)
    rule = Rule(limit, zero_if_nonfinite=bool(zero_if_nonfinite))
    total_norm = arguments.as_total_norm(total_norm)
    with torch.set_grad_enabled(False):
        total_norm = whole(total_norm)
        is_vector = total_norm.dim() != 0 or (isinstance(limit, Tensor) and limit.dim() != 0)
        segments = Segments(listed) if is_vector else None
        if segments is not None:
            segments.check_one_each("max_norm", limit)
            segments.check_one_each("total_norm", total_norm)
        selection = Selection(backend, foreach, is_intercepted())
        gradients = read_gradients(listed, selection, allows_sparse=True)
        calls.count("clip_grads_with_norm_", gradients, selection)
        if gradients is None or is_dispatch_subclass(total_norm):
            number = rule.as_torch_takes_it(total_norm)
            _torch_functions.clip_grads_with_norm_(listed, number, total_norm, foreach)
        elif gradients.tensors:
            clip_coef = rule.clip_coef(arguments.not_negative(total_norm))
            if segments is not None and isinstance(clip_coef, Tensor):
                clip_coef = segments.of_gradients(clip_coef, len(gradients.tensors))
            gradients.scale_(clip_coef, rule.zero_if_nonfinite)


@calls.profiled
def clip_grad_value_(
    parameters: Tensors,
    clip_value: float,
    foreach: bool | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Clamp every gradient element in place to ``[-clip_value, clip_value]``.

    Equivalent to :func:`torch.nn.utils.clip_grad_value_`, in one pass instead of two where
    the device allows it.

    Args:
        parameters: as in :func:`clip_grad_norm_`; with no gradient nothing happens.
        clip_value: largest allowed magnitude, 0 or more.
        foreach: as in :func:`clip_grad_norm_`.
        backend: as in :func:`clip_grad_norm_`.

    Raises:
        TypeError: as :func:`clip_grad_norm_`.
        ValueError: clip_value is negative or NaN.
        RuntimeError: clip_value is finite but beyond the range of a gradient's dtype, or a
            gradient is complex, expanded or a DTensor that still has to be summed over ranks
            (Partial). No exception changes any gradient.

    Note:
        Never synchronises; of DTensors each rank clamps its own part, without communication.
        NaN stays NaN, infinities become the bound.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> weight.grad = torch.tensor([-2.0, 0.5, 3.0])
        >>> clip_grad_value_([weight], 1.0)
        >>> weight.grad
        tensor([-1.0000,  0.5000,  1.0000])
    """
    listed = arguments.as_list("parameters", parameters)
    clip_value = arguments.as_threshold("clip_value", clip_value)
    with torch.set_grad_enabled(False):
        selection = Selection(backend, foreach, is_intercepted())
        if not _clamp_("clip_grad_value_", listed, -clip_value, clip_value, selection):
            _torch_functions.clip_grad_value_(listed, clip_value, foreach)


@calls.profiled
def clamp_grad_(
    parameters: Tensors,
    min: float | None = None,
    max: float | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Clamp every gradient element in place to ``[min, max]``; the bounds need not be symmetric.

    Equivalent to ``p.grad.clamp_(min, max)`` for every parameter that has a gradient.

    Args:
        parameters: as in :func:`clip_grad_norm_`; with no gradient nothing happens.
        min: lower bound, or None for none.
        max: upper bound, or None for none.
        backend: as in :func:`clip_grad_norm_`.

    Raises:
        TypeError: as :func:`clip_grad_norm_`.
        ValueError: both bounds are None, one is NaN, or min exceeds max.
        RuntimeError: a finite bound is beyond the range of a gradient's dtype, or a gradient
            is complex, expanded or a DTensor that still has to be summed over ranks (Partial).
            No exception changes any gradient.

    Note:
        Never synchronises; of DTensors each rank clamps its own part, without communication.
        NaN stays NaN, infinities become the bound on their side.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> weight.grad = torch.tensor([-2.0, 0.5, 3.0])
        >>> clamp_grad_([weight], min=-0.1, max=1.0)
        >>> weight.grad
        tensor([-0.1000,  0.5000,  1.0000])
    """
    listed = arguments.as_list("parameters", parameters)
    low, high = arguments.as_bounds(min, max)
    with torch.set_grad_enabled(False):
        selection = Selection(backend, None, is_intercepted())
        if not _clamp_("clamp_grad_", listed, low, high, selection):
            for parameter in listed:
                if parameter.grad is not None:
                    parameter.grad.clamp_(low, high)


def _clamp_(function: str, parameters: list[Any], low: float, high: float, selection: Selection) -> bool:
    """Clamp the gradients, or return False for a list that belongs to torch's own functions."""
    gradients = read_gradients(parameters, selection, clamps=True, needs_sign=low != -high)
    calls.count(function, gradients, selection)
    if gradients is None:
        return False
    if gradients.tensors:
        check_representable(gradients.dtypes(), low, high)
        gradients.clamp_(low, high)
    return True
