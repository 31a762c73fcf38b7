"""Run by test_dtensor.py, once per rank: every function on DTensor gradients, ours beside torch's own.

python dtensor_worker.py RANK WORLD_SIZE INIT_FILE SEED
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

# torch's own functions, from before patch_torch is used below.
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

import gradclip_ext

SHAPES = ((6, 4), (5,), (1, 3), ())  # (5,) shards unevenly; of (1, 3) the second rank holds nothing


def make(
    mesh: DeviceMesh, placement: Placement, seed: int, plain: bool = False, shapes: tuple = SHAPES
) -> list[Tensor]:
    """Return parameters with DTensor gradients, equal on every rank and for every call with one seed."""
    torch.manual_seed(seed)
    params = []
    for shape in shapes:
        place = placement if shape else Replicate()
        param = torch.nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [place]))
        param.grad = distribute_tensor(torch.randn(shape), mesh, [place])
        params.append(param)
    if plain:
        params.append(torch.nn.Parameter(torch.randn(3)))
        params[-1].grad = torch.randn(3)
    return params


def outcome(function: Callable[[list[Tensor]], Any], params: list[Tensor]) -> Any:
    """Return the result, or the kind of exception."""
    try:
        return function(params)
    except Exception as error:
        return type(error)


def local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return one is other
    placements = [getattr(v, "placements", None) for v in (one, other)]
    return placements[0] == placements[1] and torch.equal(local(one), local(other))


def compare(mesh: DeviceMesh, seed: int) -> None:
    pairs: dict[str, tuple[Callable, Callable]] = {}
    for p in (1.0, 2.0, 3.0, math.inf):
        pairs[f"clip_grad_norm_ p={p}"] = (
            lambda ps, p=p: gradclip_ext.clip_grad_norm_(ps, 0.5, p),
            lambda ps, p=p: clip_grad_norm_(ps, 0.5, p),
        )
        pairs[f"get_total_norm p={p}"] = (
            lambda ps, p=p: gradclip_ext.get_total_norm([q.grad for q in ps], p),
            lambda ps, p=p: get_total_norm([q.grad for q in ps], p),
        )
    pairs["error_if_nonfinite"] = (
        lambda ps: gradclip_ext.clip_grad_norm_(iter(ps), 0.5, error_if_nonfinite=True),
        lambda ps: clip_grad_norm_(ps, 0.5, error_if_nonfinite=True),
    )
    pairs["foreach=False"] = (
        lambda ps: gradclip_ext.clip_grad_norm_(ps, 0.5, foreach=False),
        lambda ps: clip_grad_norm_(ps, 0.5, foreach=False),
    )
    pairs["clip_grad_value_"] = (
        lambda ps: gradclip_ext.clip_grad_value_(ps, 0.3),
        lambda ps: clip_grad_value_(ps, 0.3),
    )
    pairs["clip_grads_with_norm_"] = (
        lambda ps: gradclip_ext.clip_grads_with_norm_(ps, 0.5, torch.tensor(3.0)),
        lambda ps: clip_grads_with_norm_(ps, 0.5, torch.tensor(3.0)),
    )
    pairs["clamp_grad_"] = (
        lambda ps: gradclip_ext.clamp_grad_(ps, -0.3, 0.4),
        lambda ps: [q.grad.clamp_(-0.3, 0.4) for q in ps] and None,
    )
    for placement in (Shard(0), Replicate()):
        for plain in (False, True):
            for name, (ours, theirs) in pairs.items():
                # torch's inf-norm of an empty shard raises on that rank and leaves the others waiting.
                shapes = tuple(s for s in SHAPES if s != (1, 3) or "inf" not in name)
                sets = [make(mesh, placement, seed, plain, shapes) for _ in range(2)]
                results = outcome(ours, sets[0]), outcome(theirs, sets[1])
                where = f"{name}, {placement}, plain={plain}"
                assert same(*results), f"{where}: {results}"
                for one, other in zip(*sets):
                    assert same(one.grad, other.grad), where


def norm_is_global(mesh: DeviceMesh, seed: int) -> None:
    """Not the norm of the local shard (pytorch#170862)."""
    params = make(mesh, Shard(0), seed)
    whole = torch.cat([p.grad.full_tensor().reshape(-1) for p in params])
    norm = gradclip_ext.clip_grad_norm_(params, 0.5).full_tensor()
    torch.testing.assert_close(norm, whole.norm())
    after = torch.cat([p.grad.full_tensor().reshape(-1) for p in params])
    torch.testing.assert_close(after, whole * (0.5 / whole.norm()), rtol=1e-5, atol=1e-7)


def patched_does_not_recurse(mesh: DeviceMesh, seed: int) -> None:
    with gradclip_ext.patch_torch():
        params = make(mesh, Shard(0), seed)
        norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
        assert isinstance(norm, DTensor)


def hook(mesh: DeviceMesh, seed: int) -> None:
    """Clamping in backward works on shards: it needs no communication."""
    params = make(mesh, Shard(0), seed)[:1]
    params[0].grad = None
    with gradclip_ext.register_clamp_hook(params, -0.1, 0.2) as handle:
        assert len(handle) == 1
        (params[0] * params[0].detach() * 9).sum().backward()
    grad = params[0].grad
    assert isinstance(grad, DTensor)
    expected = (params[0].detach().full_tensor() * 9).clamp(-0.1, 0.2)
    torch.testing.assert_close(grad.full_tensor(), expected)


def bad_thresholds_are_refused_before_anything(mesh: DeviceMesh, seed: int) -> None:
    params, untouched = (make(mesh, Shard(0), seed) for _ in range(2))
    for call in (
        lambda: gradclip_ext.clip_grad_norm_(params, -1.0),
        lambda: gradclip_ext.clip_grad_value_(params, math.nan),
        lambda: gradclip_ext.clamp_grad_(params, 1.0, 0.0),
    ):
        assert outcome(lambda _, call=call: call(), params) is ValueError
    assert all(same(a.grad, b.grad) for a, b in zip(params, untouched))


def main() -> None:
    rank, world, init_file, seed = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    failed = False
    for check in (
        compare,
        norm_is_global,
        patched_does_not_recurse,
        hook,
        bad_thresholds_are_refused_before_anything,
    ):
        try:
            check(mesh, seed)
            print(f"ok {check.__name__}", flush=True)
        except Exception:
            failed = True
            print(f"failed {check.__name__}\n{traceback.format_exc()}", flush=True)
            break  # the other rank may be in another collective by now
    if failed:
        sys.exit(1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
