"""Which ranks take part in a call, and the all-reduces that join them.

Everything here follows from the meshes of the parameters and from ``group=``, never from gradients: it has to
come out the same on all ranks, and a gradient may be None on some. This file and ``_dtensors.py`` are where
torch's names for meshes and DTensors are imported.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from gradclip_ext.arguments import describe

Group = ProcessGroup | DeviceMesh
# One all-reduce: a source (its position in Layout's list), and the dimension if that is a mesh.
_Step = tuple[int, int | None]


class Layout:
    """The ranks of one call: how many there are, how they are joined, and who holds what.

    Refers weakly to meshes and groups, so that a cached layout keeps none of them alive.

    Args:
        meshes: the meshes of the DTensors, each once.
        groups: what the caller passed as ``group=``; None if nothing was said.

    Raises:
        ValueError: the meshes or groups do not fit together, or this rank is not in a group.
    """

    def __init__(self, meshes: Sequence[DeviceMesh], groups: Sequence[Group] | None) -> None:
        world = [dist.group.WORLD] if dist.is_initialized() else []
        sources: list[Any] = [*meshes, *(groups or ()), *world]
        self._sources = [weakref.ref(source) for source in sources]
        rank = dist.get_rank() if world else 0
        ranks = [_ranks_of(source) for source in sources]
        where = dict(zip(map(id, meshes), ranks))
        if groups is None and len(set(where.values())) > 1:
            raise ValueError(_undecided(list(dict.fromkeys(where.values()))))
        on_this_rank = [mesh for mesh in meshes if rank in where[id(mesh)]]
        joined = _Ranks(rank)
        others = range(len(meshes), len(meshes) + len(groups or ()))
        all_meshes = frozenset[int]().union(*(where[id(mesh)] for mesh in on_this_rank))
        base = None
        # A group that holds all of the meshes' ranks stands for them: a rank without parameters has only it.
        if on_this_rank and not any(all_meshes <= ranks[index] for index in others):
            base = min(on_this_rank, key=lambda mesh: (-len(where[id(mesh)]), *_order(mesh)))
            if where[id(base)] != all_meshes:
                raise ValueError(
                    "the parameters' meshes overlap, and none holds the ranks of all: "
                    f"{_listed(dict.fromkeys(where.values()))}. Pass a group= that holds all of their ranks"
                )
            index = next(i for i, mesh in enumerate(meshes) if mesh is base)
            joined.add(ranks[index], _steps_of(index, base))
        for index in others:
            joined.add(ranks[index], _steps_of(index, sources[index]))
        #: How many ranks take part.
        self.size: int = joined.size
        #: The all-reduces, in order.
        self.steps: list[_Step] = joined.steps
        if len(self.steps) > 1 and self.size == dist.get_world_size():
            self.steps = [(len(sources) - 1, None)]
        #: The numbers of parameters, and checksums of their names, that all ranks were found to agree on.
        self.agreed: set[tuple[int, int]] = set()
        named = [base, *(groups or ()), *on_this_rank]
        #: Where to communicate: for a group with several backends it has to be the same on all ranks.
        self.device_type: str | None = next((g.device_type for g in named if isinstance(g, DeviceMesh)), None)
        # Among how many sets of ranks like a mesh's (or like this rank alone) the groups say that
        # gradients differ.
        self._sets: dict[int | None, float] = {None: _spread(frozenset((rank,)), rank, ranks, others)}
        for mesh in on_this_rank:
            self._sets[id(mesh)] = _spread(where[id(mesh)], rank, ranks, others)

    def weight(self, mesh: DeviceMesh | None, pieces: int, copies: int = 1) -> float:
        """Return what share of a tensor's sum one rank adds, so that all ranks' shares add up to one sum.

        Args:
            mesh: the tensor's mesh; None for a plain tensor.
            pieces: into how many parts its ranks divide it.
            copies: on how many ranks of the groups the same tensor lies.
        """
        sets = self._sets.get(None if mesh is None else id(mesh), 1.0)
        if copies > sets:
            raise ValueError(
                f"copies returned {copies}, but group= joins this gradient to {sets - 1:g} others: return on "
                "how many ranks of group= the same gradient lies, 1 where group= only has others"
            )
        return pieces * sets / copies / self.size

    def all_reduce(self, value: Tensor, op: Any) -> Tensor:
        """Return a tensor reduced over all ranks, on its own device; the argument may be overwritten."""
        for step in self.steps:
            group = self.group_of(step)
            sent = value.to(communication_device(group, value.device, self.device_type))
            dist.all_reduce(sent, op, group)
            value = sent.to(value.device)
        return value

    def device(self) -> torch.device:
        """Return the device for the result of a rank that has no tensors."""
        if not self.steps:
            return torch.device("cpu")
        return communication_device(self.group_of(self.steps[0]), torch.device("cpu"), self.device_type)

    def group_of(self, step: _Step) -> Any:
        index, dim = step
        source: Any = self._sources[index]()
        return source if dim is None else source.get_group(dim)


class _Ranks:
    """Ranks joined one group after the other, as far as one rank can tell."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        # A group that shares only this rank with the ranks before it adds ranks that this rank cannot name:
        # each of those ranks has such a group of its own. So size may exceed the number of known ranks.
        self.known = frozenset((rank,))
        self.size = 1
        self.steps: list[_Step] = []

    def add(self, ranks: frozenset[int], steps: list[_Step]) -> None:
        if ranks <= self.known:
            return
        if ranks >= self.known and len(ranks) >= self.size:
            self.known, self.size, self.steps = ranks, len(ranks), steps
        elif ranks & self.known == {self._rank}:
            self.known, self.size, self.steps = (
                self.known | ranks,
                self.size * len(ranks),
                [*self.steps, *steps],
            )
        elif self._rank not in ranks:
            raise ValueError(
                f"rank {self._rank} passed a group of {_listed([ranks])}, which it is not in: pass the group "
                "that this rank belongs to"
            )
        else:
            raise ValueError(
                f"a group of {_listed([ranks])} overlaps {_listed([self.known])} in part: a group has to lie "
                f"inside the ranks before it, hold all of them, or share only rank {self._rank} with them"
            )


# ---------------------------------------------------------------- layouts are made once

_layouts: dict[tuple[Any, ...], Layout] = {}


def layout_of(meshes: Sequence[DeviceMesh], group: Any) -> Layout:
    """Return the layout of these meshes and of ``group=``.

    It is made once for the same objects: a set of 100,000 ranks takes milliseconds to compare. The entry goes
    when one of them does.
    """
    groups = as_groups(group)
    world = dist.group.WORLD if dist.is_initialized() else None
    members = [*meshes, *(groups or ()), *([] if world is None else [world])]
    key = (groups is None, len(meshes), *map(id, members))
    layout = _layouts.get(key)
    if layout is None:
        layout = _layouts[key] = Layout(meshes, groups)
        for member in members:
            weakref.finalize(member, _layouts.pop, key, None).atexit = False
    return layout


def as_groups(group: Any) -> tuple[Group, ...] | None:
    """Return what was passed as ``group=``, as a tuple."""
    if group is None:
        return None
    given = (group,) if isinstance(group, Group) else group
    groups = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    for element in groups:
        if not isinstance(element, Group):
            hint = "pass one of these"
            if isinstance(element, str):
                hint = f"pass mesh[{element!r}]"
            elif isinstance(element, int) and element == dist.GroupMember.NON_GROUP_MEMBER:
                hint = "this rank is not a member of that group"
            elif isinstance(element, int):
                hint = "pass torch.distributed.new_group(...) of these ranks, made on all ranks alike"
            raise TypeError(
                "group must be a ProcessGroup, a DeviceMesh or a sequence of these, got "
                f"{describe(element)}: {hint}"
            )
    return groups


# ---------------------------------------------------------------- ranks


def _ranks_of(source: Group) -> frozenset[int]:
    if isinstance(source, DeviceMesh):
        return frozenset(source.mesh.flatten().tolist())
    return frozenset(dist.get_process_group_ranks(source))


def _steps_of(index: int, source: Group) -> list[_Step]:
    if not isinstance(source, DeviceMesh):
        return [(index, None)] if source.size() > 1 else []
    return [(index, dim) for dim in reversed(range(source.ndim)) if source.size(dim) > 1]


def _order(mesh: DeviceMesh) -> tuple[Any, ...]:
    """Return what orders meshes over the same ranks, alike on all of them: the fewest all-reduces first."""
    sizes = [size for size in mesh.mesh.shape if size > 1]
    name = mesh.get_group(0).group_name if mesh.ndim == 1 else ""
    return len(sizes), sizes, mesh.mesh.flatten().tolist(), mesh.mesh_dim_names or (), name


def _spread(start: frozenset[int], rank: int, ranks: list[frozenset[int]], others: range) -> float:
    joined = _Ranks(rank)
    joined.add(start, [])
    for index in others:
        joined.add(ranks[index], [])
    return joined.size / len(start)


def _listed(sets: Iterable[frozenset[int]]) -> str:
    return " and ".join("ranks " + _shortened(sorted(ranks)) for ranks in sets)


def _shortened(ranks: list[int]) -> str:
    return str(ranks) if len(ranks) <= 8 else f"[{', '.join(map(str, ranks[:6]))}, ... {ranks[-1]}]"


def _undecided(sets: list[frozenset[int]]) -> str:
    return (
        f"the parameters lie on meshes over different ranks, {_listed(sets)}, and nothing tells whether the "
        "ranks outside of a smaller mesh hold copies of its gradients or others. Pass group=() if they hold "
        "copies (FSDP with a partial tensor-parallel plan), or in group= the mesh or process group across "
        "which gradients differ (group=ep_mesh for experts), or clip the two kinds in two calls"
    )


# ---------------------------------------------------------------- devices


def communication_device(group: Any, device: torch.device, preferred: str | None = None) -> torch.device:
    """Return the device on which a group communicates about a value: its own if there is a backend for it.

    A group with one backend for the CPU and another one for an accelerator needs all ranks on the same side,
    wherever their gradients are.
    """
    if torch.compiler.is_compiling():
        return device
    types = [d.type for d in group._device_types]
    if preferred is None or preferred not in types:
        accelerators = [kind for kind in types if kind != "cpu"]
        if "cpu" not in types or (accelerators and not _shares_backend(group, accelerators[0])):
            preferred = accelerators[0]
        else:
            preferred = device.type if device.type in types else "cpu"
    return device if device.type == preferred else torch.device(preferred)


def _shares_backend(group: Any, accelerator: str) -> bool:
    get: Callable[[torch.device], Any] = group._get_backend
    return get(torch.device("cpu")) is get(torch.device(accelerator))
