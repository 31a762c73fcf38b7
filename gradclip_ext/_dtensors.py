"""DTensors: what of them lies on this rank, and in which form."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from gradclip_ext import _extension
from gradclip_ext._layout import communication_device

# Exactly these types: a subclass may mean something else (_NormPartial, _MaskPartial). How a tensor is cut
# (_StridedShard) does not matter, only into how many parts.
_SHARDS = (Shard, _StridedShard)
_COMPLETE = (*_SHARDS, Replicate)
_KNOWN = (*_COMPLETE, Partial)
_SUMS = ("sum", "avg")
_LARGER_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}
# reduce_scatter_tensor warns since it got this name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def unwrap(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int], list[Tensor]]:
    """Return each tensor's part on this rank, the number of its class, and one tensor of each class.

    Tensors of one class have the same mesh object and the same types of placements, so each rank holds the
    same share of them; plain tensors are one class. Comparing placements would cost as much again.
    """
    if _extension.C is not None and tensors:
        found: tuple[list[Tensor], list[int], list[Tensor]] | None
        found = _extension.C.unwrap(list(tensors), DTensor, _COMPLETE)
        if found is not None:
            return found
    parts: list[Tensor] = []
    numbers: list[int] = []
    examples: list[Tensor] = []
    known: dict[Any, int] = {}
    for tensor in tensors:
        key: Any = None
        if type(tensor) is DTensor:
            part = tensor._local_tensor
            parts.append(part.wait() if type(part) is AsyncCollectiveTensor else part)
            spec = tensor._spec
            placements = spec.placements
            key = (id(spec.mesh), *map(type, placements))
        else:
            parts.append(tensor)
        number = known.get(key)
        if number is None and key is not None and Partial in key:  # such never enter under this key alone
            key = (*key, *(getattr(p, "reduce_op", None) for p in placements))
            number = known.get(key)
        if number is None:
            number = known[key] = len(examples)
            examples.append(tensor)
        numbers.append(number)
    return parts, numbers, examples


def meshes_of(*examples: Sequence[Tensor]) -> list[DeviceMesh]:
    """Return the meshes of DTensors, each mesh object once."""
    meshes = [t._spec.mesh for t in chain(*examples) if type(t) is DTensor]
    return list({id(mesh): mesh for mesh in meshes}.values())


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    return tensor._spec.mesh if type(tensor) is DTensor else None


def pieces_of(tensor: Tensor) -> int:
    """Return into how many parts a tensor is divided after it was summed over its Partial dimensions."""
    if type(tensor) is not DTensor:
        return 1
    spec = tensor._spec
    return math.prod(spec.mesh.size(dim) for dim, p in enumerate(spec.placements) if type(p) is not Replicate)


def partial_dims(tensor: Tensor) -> list[int]:
    """Return the dimensions of a tensor's mesh over which it has to be summed yet."""
    if type(tensor) is not DTensor:
        return []
    return [dim for dim, p in enumerate(tensor._spec.placements) if type(p) is Partial]


def why_unsupported(tensor: Tensor) -> str | None:
    """Return why the norm of a tensor with these placements cannot be computed here, or None if it can."""
    if type(tensor) is not DTensor:
        return None
    for placement in tensor._spec.placements:
        if type(placement) not in _KNOWN or getattr(placement, "reduce_op", "sum") not in _SUMS:
            return f"its placement {placement!r} is not supported: redistribute it to Shard or Replicate"
    return None


def is_cut(tensor: Tensor) -> bool:
    """Tell whether ranks hold different parts of a tensor."""
    return type(tensor) is DTensor and any(type(p) in _SHARDS for p in tensor._spec.placements)


def weights_with_whole_units(parameters: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's part of each weight, for adaptive clipping, which looks at slices along dimension 0.

    Raises:
        NotImplementedError: a weight or gradient is divided in another way, so that no rank has whole slices.
    """
    for index, pair in enumerate(zip(parameters, grads)):
        for what, tensor in zip(("parameter", "gradient"), pair):
            placements = tensor._spec.placements if type(tensor) is DTensor else ()
            for placement in placements:
                is_cut = tensor.dim() > 1 and getattr(placement, "dim", None) == 0
                is_cut = is_cut and type(placement) in _SHARDS
                if type(placement) is not Replicate and not is_cut:
                    raise NotImplementedError(
                        f"{what} {index} (shape {tuple(tensor.shape)}) has the placements {placements}, so "
                        "no rank has whole slices along dimension 0, which adaptive clipping compares: leave "
                        "it out, or redistribute it to Shard(0), or to Replicate below two dimensions"
                    )
    return unwrap(parameters)[0]


def replicated(norm: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return a norm that all ranks have as a DTensor."""
    return DTensor.from_local(norm, mesh, [Replicate()] * mesh.ndim, run_check=False)


# ---------------------------------------------------------------- gradients that still have to be summed


# Elements that are summed by one collective: 32 MB of float32. More would take memory, and hardly less time.
_SUMMED = 1 << 23


class _Flat:
    """A flat piece of a DTensor, and what remains to be summed."""

    def __init__(self, values: Tensor, mesh: DeviceMesh, placements: Sequence[Any]) -> None:
        self.values = values
        self.mesh = mesh
        self.placements = placements

    def sum_dtype(self) -> torch.dtype:
        """Return the dtype in which it is summed."""
        return _LARGER_DTYPE.get(self.values.dtype, self.values.dtype)


def sum_partials(tensors: Sequence[Any]) -> list[Tensor]:
    """Return for each DTensor with Partial placements this rank's flat piece of the summed tensor.

    For each dimension of a mesh (and dtype), one reduce-scatter of each 32 MB: in float32 for half types,
    without the padding that makes the pieces equally long. All ranks of that dimension need the same tensors
    in the same order.
    """
    flats = [
        _Flat(part.reshape(-1), tensor._spec.mesh, tensor._spec.placements)
        for part, tensor in zip(unwrap(tensors)[0], tensors)
    ]
    for dim in reversed(range(max((len(flat.placements) for flat in flats), default=0))):
        together: dict[Any, list[_Flat]] = {}
        for flat in flats:
            if dim < len(flat.placements) and type(flat.placements[dim]) is Partial:
                together.setdefault((id(flat.mesh), flat.sum_dtype()), []).append(flat)
        for group in together.values():
            for bucket in _buckets(group):
                _sum_over(bucket, dim)
    return [flat.values for flat in flats]


def _buckets(flats: list[_Flat]) -> Iterator[list[_Flat]]:
    """Divide a list into such of at most _SUMMED elements, or of one tensor; alike on all ranks."""
    bucket: list[_Flat] = []
    numel = 0
    for flat in flats:
        if bucket and numel + flat.values.numel() > _SUMMED:
            yield bucket
            bucket, numel = [], 0
        bucket.append(flat)
        numel += flat.values.numel()
    yield bucket


def _sum_over(flats: list[_Flat], dim: int) -> None:
    mesh = flats[0].mesh
    size = mesh.size(dim)
    if size == 1:
        return
    process_group = mesh.get_group(dim)
    numels = [flat.values.numel() for flat in flats]
    chunk = -(-sum(numels) // size)
    device = flats[0].values.device
    joined = torch.zeros(chunk * size, dtype=flats[0].sum_dtype(), device=device)
    for flat, part in zip(flats, joined.split([*numels, chunk * size - sum(numels)])):
        part.copy_(flat.values)
    sent = joined.to(communication_device(process_group, device, mesh.device_type))
    piece = sent.new_empty(chunk)
    if sent.is_complex():
        _reduce_scatter(
            torch.view_as_real(piece).view(-1), torch.view_as_real(sent).view(-1), group=process_group
        )
    else:
        _reduce_scatter(piece, sent, group=process_group)
    piece = piece.to(device)
    first = mesh.get_local_rank(dim) * chunk
    start = 0
    for flat, numel in zip(flats, numels):
        low, high = (min(max(edge - first, 0), chunk) for edge in (start, start + numel))
        flat.values = piece[low:high]
        if flat.placements[dim].reduce_op == "avg":
            flat.values = flat.values / size
        start += numel
