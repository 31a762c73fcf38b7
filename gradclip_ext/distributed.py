"""Sharded training: one norm over the gradients of many ranks.

Imported only when a DTensor or ``group=`` appears, because torch's DTensor takes a second to import.

Each rank takes the norm of what lies on it. Every tensor's sum enters with a weight (:meth:`Layout.weight`),
so that the sum over all ranks counts each gradient once, and one float64 number travels. Copies are weighted,
not skipped: a NaN on any rank then reaches all of them, and nobody's coordinates in a mesh are needed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gradclip_ext import _dtensors, arguments, gradients
from gradclip_ext._dtensors import mesh_of, meshes_of, unwrap
from gradclip_ext._joint_norm import Call, Copies, JointNorm
from gradclip_ext._layout import Layout, layout_of
from gradclip_ext.backends import Selection
from gradclip_ext.gradient_list import GradientList
from gradclip_ext.norms import AdaptiveRule, Coefficient, Rule, combine_norms
from gradclip_ext.segments import Segments, listed_once


def count_elements(parameters: Any, *, group: Any = None, copies: Copies | None = None) -> Tensor:
    """Return how many elements the model has over all ranks, each counted once.

    Counts with the weights that :func:`gradclip_ext.clip_grad_norm_` gives to gradients. Where the result is
    not the model's parameter count, ``group`` or ``copies`` do not say how it is distributed: this is the
    check to run once at the start.

    Args:
        parameters: the parameters on this rank, with or without gradients; one listed twice counts once.
        group: as in :func:`gradclip_ext.clip_grad_norm_`.
        copies: as there.

    Returns:
        A 0-d int64 tensor, the same on all ranks.

    Raises:
        TypeError, ValueError: as :func:`gradclip_ext.clip_grad_norm_`.
        RuntimeError: another rank raised one of these.

    Note:
        Communicates as the norm of order 2 does, and waits for the result.

    Examples:
        >>> count_elements([torch.nn.Parameter(torch.zeros(3, 2))])
        tensor(6)
    """
    listed = _parameters(parameters)
    with torch.no_grad():
        parts, numbers, examples = unwrap(listed)
        layout = layout_of(meshes_of(examples), group)
        error: Exception | None = None
        count = math.nan
        try:
            classes, weights = _weights(layout, listed, numbers, examples, copies)
            count = sum(weights[number] * part.numel() for number, part in zip(classes, parts))
        except Exception as caught:
            error = caught  # raised after the all-reduces that the other ranks wait for
        device = parts[0].device if parts else layout.device()
        total = layout.all_reduce(torch.tensor(count, dtype=torch.float64, device=device), dist.ReduceOp.SUM)
        if error is not None:
            raise error
        if total.isnan():
            raise RuntimeError("count_elements failed on another rank, which raised the reason")
        return total.round().to(torch.int64)


def warm_up(parameters: Any, *, group: Any = None) -> None:
    """Communicate once over every group that clipping by norm will use.

    A communicator is created by its first use. Without this, that may be in the first call to clip, at the
    peak of memory, or inside a CUDA graph, where it is not possible.

    Args:
        parameters: as they will be clipped.
        group: as in :func:`gradclip_ext.clip_grad_norm_`.

    Raises:
        TypeError, ValueError: as :func:`gradclip_ext.clip_grad_norm_`.

    Note:
        All ranks have to call it. Communicates 8 bytes as the norm does; does not synchronise.

    Examples:
        >>> warm_up([torch.nn.Parameter(torch.zeros(3, 2))])
    """
    listed = _parameters(parameters)
    layout = layout_of(meshes_of(unwrap(listed)[2]), group)
    device = listed[0].device if listed else layout.device()
    layout.all_reduce(torch.zeros((), dtype=torch.float64, device=device), dist.ReduceOp.SUM)


def _parameters(parameters: Any) -> list[Tensor]:
    listed = arguments.as_list("parameters", parameters)
    arguments.raise_if_not_tensors("parameters", listed)
    return listed_once(listed)


# ---------------------------------------------------------------- reading


def read_gradients(
    parameters: list[Any],
    grads: list[Any],
    selection: Selection,
    *,
    written: bool,
    clamps: bool,
    needs_sign: bool,
    allows_sparse: bool,
    norm_type: float | None,
    group: Any,
    copies: Copies | None,
) -> GradientList | None:
    """Return what :func:`gradients.read_gradients` does, of parameters with DTensors or for a group."""
    once = listed_once(parameters)
    if len(once) < len(parameters):
        grads = [p.grad for p in once if p.grad is not None]
    owners = once if len(grads) == len(once) else [p for p in once if p.grad is not None]

    def read(parts: list[Tensor]) -> GradientList:
        if not written:
            return gradients.read_only(parts, selection)
        return gradients.read_written(parts, selection, needs_sign=needs_sign, allows_sparse=allows_sparse)

    if norm_type is not None:
        call = Call(once, owners, grads, selection, norm_type, group, copies)
        return _read_for_norm(call, read)
    parts, numbers, examples = unwrap(grads)
    if gradients.has_dispatch_subclass(parts):
        return None
    if clamps and (example := _first(examples, _dtensors.partial_dims)) is not None:
        index = numbers.index(example)
        raise RuntimeError(
            f"gradient {index} (shape {tuple(grads[index].shape)}) has the placements "
            f"{grads[index].placements}, so it still has to be summed over ranks, and clamping the parts of "
            "a sum does not clamp the sum: reduce it first, for instance with redistribute()"
        )
    return ShardedGradients(read(parts), grads)


def read_tensors(
    tensors: list[Tensor], selection: Selection, *, norm_type: float, group: Any, copies: Copies | None
) -> GradientList | None:
    """Return what :func:`gradients.read_tensors` does, of DTensors or for a group."""
    call = Call(tensors, tensors, tensors, selection, norm_type, group, copies)
    return _read_for_norm(call, lambda parts: gradients.read_only(parts, selection))


def _read_for_norm(call: Call, read: Callable[[list[Tensor]], GradientList]) -> ShardedGradients | None:
    """Return the tensors and how they lie on the ranks, or None for what belongs to torch's functions."""
    parts, numbers, examples = unwrap(call.tensors)
    owners: Sequence[Tensor] = examples
    # Parameters are asked for the meshes only where that may say more: it takes as long as to ask gradients.
    if len(call.tensors) < len(call.parameters) or any(mesh_of(t) is None for t in examples):
        owners = unwrap(call.parameters)[2]
    meshes = meshes_of(owners, examples)
    is_torchs = call.group is None and len(meshes) == 1
    is_torchs = is_torchs and all(mesh_of(t) is not None for t in examples or owners)
    problem = _problem(call, parts, numbers, examples)
    if is_torchs and (problem is not None or call.norm_type == 0.0):
        return None
    if call.norm_type == 0.0:
        raise NotImplementedError(
            "norm_type=0 counts whole tensors, of which ranks hold parts: pass another norm_type, or only "
            "DTensors of one mesh and no group="
        )
    layout = layout_of(meshes, call.group)
    partial = {number for number, example in enumerate(examples) if _dtensors.partial_dims(example)}
    unsummed = [index for index, number in enumerate(numbers) if number in partial] if partial else []
    joint = JointNorm(call, layout, parts, unsummed)
    whole = GradientList([], [])
    try:
        if problem is not None:
            raise NotImplementedError(problem)
        joint.numbers, joint.weights = _weights(layout, call.owners, numbers, examples, call.copies)
        joint.whole = whole = read(parts)
    except Exception as error:
        joint.error = error  # raised after the all-reduces that the other ranks wait for
    return ShardedGradients(whole, call.tensors, joint, meshes[0] if is_torchs else None)


def _problem(call: Call, parts: list[Tensor], numbers: list[int], examples: list[Tensor]) -> str | None:
    """Return why the norm cannot be computed here, with the tensor that is to blame, or None if it can."""
    if gradients.has_dispatch_subclass(parts):
        index = next(i for i, part in enumerate(parts) if gradients.is_dispatch_subclass(part))
        reason = f"on this rank it holds a {type(parts[index]).__name__}, which dispatches by itself"
    elif (example := _first(examples, _dtensors.why_unsupported)) is not None:
        index = numbers.index(example)
        reason = str(_dtensors.why_unsupported(examples[example]))
    else:
        return None
    shape = tuple(call.tensors[index].shape)
    return f"the norm of tensor {index} (shape {shape}) cannot be computed: {reason}"


def _weights(
    layout: Layout,
    owners: Sequence[Tensor],
    numbers: list[int],
    examples: Sequence[Tensor],
    copies: Copies | None,
) -> tuple[Sequence[int], list[float]]:
    """Return the number of each tensor's class, and the weights of the classes: with copies, one a tensor."""
    if copies is None:
        return numbers, [layout.weight(mesh_of(e), _dtensors.pieces_of(e)) for e in examples]
    weights = []
    for index, (owner, number) in enumerate(zip(owners, numbers)):
        answer = copies(owner)
        count = operator.index(answer) if hasattr(answer, "__index__") else 0
        if count < 1:
            raise ValueError(
                f"copies returned {answer!r} for tensor {index} (shape {tuple(owner.shape)}), not on "
                "how many ranks of group= this same gradient lies: return an int of 1 or more"
            )
        example = examples[number]
        weights.append(layout.weight(mesh_of(example), _dtensors.pieces_of(example), count))
    return range(len(weights)), weights


def _first(elements: Sequence[Any], test: Callable[[Any], Any]) -> int | None:
    return next((index for index, element in enumerate(elements) if test(element)), None)


# ---------------------------------------------------------------- adaptive clipping


def set_apart_cut_units(parameters: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return the parameters that are one unit of adaptive clipping each and divided among ranks, and all
    other ones."""
    is_cut = [p.dim() < 2 and _dtensors.is_cut(p) for p in parameters]
    return list(compress(parameters, is_cut)), [p for p, cut in zip(parameters, is_cut) if not cut]


def cut_units(
    parameters: list[Any], rule: AdaptiveRule, selection: Selection, error: Exception | None
) -> list[tuple[GradientList, Tensor]]:
    """Return the gradients of such parameters, a list for each mesh, and their coefficients.

    Args:
        parameters: as :func:`set_apart_cut_units` returns them, alike on all ranks of a mesh.
        rule: makes the coefficients.
        selection: which backend handles a device.
        error: what is wrong elsewhere on this rank. It is raised after the all-reduces that other ranks wait
            for; these get NaN.
    """
    order = rule.norm_type
    found: list[tuple[GradientList, Tensor]] = []
    for mesh in meshes_of(parameters):
        listed = [p for p in parameters if mesh_of(p) is mesh]
        owners = [p for p in listed if p.grad is not None]
        grads = [p.grad for p in owners]
        if any(p.shape != p.grad.shape for p in owners):
            error = error or RuntimeError("a gradient and its weight differ in shape: they have to be alike")
        norms: list[Tensor] = []
        sharded = None
        for call, read in (
            (Call(listed, listed, listed, selection, order, None, None), gradients.read_only),
            (Call(listed, owners, grads, selection, order, None, None), gradients.read_written),
        ):
            sharded = _read_for_norm(call, partial(read, selection=selection))
            if sharded is None or not order > 0.0:
                raise NotImplementedError(
                    f"adaptive_clip_grad_: parameters of one dimension that are divided among ranks as "
                    f"{listed[0].placements} are not supported with norm_type={order}: leave them out, as "
                    "[p for p in model.parameters() if p.dim() > 1] does"
                )
            try:
                norms.append(sharded.wide_norms(error))
            except Exception as caught:
                error = caught
        if error is None and sharded is not None:
            coefs = rule.clip_coef(norms[1], norms[0])
            found.append((sharded, Segments(listed).of_gradients(coefs, len(owners))))
    if error is not None:
        raise error
    return found


# ---------------------------------------------------------------- the gradients of this rank


class ShardedGradients(GradientList):
    """This rank's part of the gradients, and their norm over all ranks.

    Args:
        whole: what lies on this rank, as one list.
        tensors: the same as the caller gave them: DTensors and plain tensors.
        joint: the norm; None if only values will be changed.
        mesh: the mesh of the DTensor that a norm is returned as, None for a plain tensor.
    """

    is_sharded = True

    def __init__(
        self,
        whole: GradientList,
        tensors: Sequence[Tensor],
        joint: JointNorm | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__(whole.tensors, whole._parts, whole._written, whole._is_intercepted)
        self._wrappers = tensors
        self._joint = joint
        self._mesh = mesh

    def norm(
        self, norm_type: float, rule: Rule, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Coefficient]:
        """Return the norm over all ranks, the same bits on each, and the coefficient that follows from it."""
        assert self._joint is not None
        total = self._joint.take().to(dtype or self._joint.dtype())
        return total, rule.clip_coef(total)

    def norm_dtype(self) -> torch.dtype:
        assert self._joint is not None
        return self._joint.dtype()

    def wide_norm(self, norm_type: float) -> Tensor:
        assert self._joint is not None
        return self._joint.take()

    def statistics(self, norm_type: float, names: Sequence[str] | None) -> tuple[Tensor, Tensor]:
        """Return the norm over all ranks, and rows with a column for each parameter, the same on each."""
        assert self._joint is not None
        rows = self._joint.statistics(names)
        total = combine_norms(rows[0].unbind(), norm_type) if rows.numel() else rows.new_zeros(())
        return total.to(self._joint.dtype()), rows

    def norms(self, norm_type: float) -> Tensor:
        """Return the norm of each parameter's whole gradient, the same on all ranks."""
        return self.wide_norms().to(self.norm_dtype())

    def wide_norms(self, error: Exception | None = None) -> Tensor:
        """Return these norms in float64, or raise: the error, too, when all ranks have communicated."""
        assert self._joint is not None
        self._joint.error = self._joint.error or error
        return self._joint.norms()

    def as_result(self, total_norm: Tensor) -> Tensor:
        return total_norm if self._mesh is None else _dtensors.replicated(total_norm, self._mesh)

    def on_this_rank(self, tensor: Tensor) -> Tensor:
        return unwrap([tensor])[0][0]

    def _bump_versions(self) -> None:
        super()._bump_versions()
        if not self._is_intercepted:
            torch.autograd.graph.increment_version(self._wrappers)
