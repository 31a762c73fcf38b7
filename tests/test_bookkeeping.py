"""Everything around the numbers: what is returned, written, kept, counted once, or left alone."""

from __future__ import annotations

import math
import threading
import warnings
from pathlib import Path

import oracle
import pytest
import torch
from cases import Target, clones, cpu_backends, grads_of, random
from oracle import parameter, torch_clip_grad_norm_
from subprocesses import run_python
from torch import Tensor

import gradclip_ext

# ---------------------------------------------------------------- the returned norm


def test_returned_norms_are_fresh(backend: Target) -> None:
    """Users keep hundreds of norms: none may be a view of memory that the next call reuses."""
    for norm_type in (0.0, 0.5, 1.0, 2.0, math.inf, -math.inf):
        lists = [[random(5, device=backend.device), random(3, device=backend.device)] for _ in range(40)]
        kept = [backend.get_total_norm(tensors, norm_type) for tensors in lists]
        kept += [backend.clip_grad_norm_([parameter(t) for t in ts], 1e9, norm_type) for ts in lists]
        assert len({n.data_ptr() for n in kept}) == len(kept)
        assert len({n.untyped_storage().data_ptr() for n in kept}) == len(kept)
        for norm, tensors in zip(kept, lists * 2):
            oracle.assert_norm(norm, tensors, norm_type)


def test_returned_norm_is_not_the_gradient(backend: Target) -> None:
    """A single 0-d gradient is its own norm in value, never in memory."""
    for norm_type in (0.5, 1.0, 2.0, math.inf, -math.inf):
        for dtype in (torch.float32, torch.float64):
            grad = torch.tensor(7.0, dtype=dtype, device=backend.device)
            norm = backend.clip_grad_norm_(parameter(grad), 1.0, norm_type)
            assert norm.item() == pytest.approx(7.0) and grad.item() == pytest.approx(1 / (1 + 1e-6 / 7))


def test_same_input_same_bits(backend: Target) -> None:
    grads = [
        backend.random(300, 70),
        backend.random(5),
        backend.random(40_000),
        backend.random(9, dtype=torch.bfloat16),
    ]
    for norm_type in (0.5, 1.0, 2.0, 3.0, math.inf):
        runs = []
        for _ in range(4):
            params = [parameter(g.clone()) for g in grads]
            runs.append([backend.clip_grad_norm_(params, 1.0, norm_type), *grads_of(params)])
        for run in runs[1:]:
            for one, other in zip(run, runs[0]):
                oracle.assert_same_bits(one, other)


# ---------------------------------------------------------------- what the caller owns


def test_list_and_identity_are_kept(backend: Target) -> None:
    for name, call in backend.calls().items():
        params = backend.parameters((4,), (0,), (2, 3))
        params.insert(1, torch.nn.Parameter(torch.ones(2)))
        listed, grads = list(params), [p.grad for p in params]
        call(listed)
        assert len(listed) == len(params) and all(a is b for a, b in zip(listed, params)), name
        assert all(p.grad is g for p, g in zip(params, grads)), name


@pytest.mark.parametrize("clips", [True, False])
def test_version_counter_is_bumped_even_when_nothing_is_written(backend: Target, clips: bool) -> None:
    threshold = 0.01 if clips else 1e6
    total = torch.tensor(5.0, device=backend.device)
    calls = {
        "norm": lambda params: backend.clip_grad_norm_(params, threshold),
        "norm, max_norm=inf": lambda params: backend.clip_grad_norm_(params, math.inf),
        "inf-norm": lambda params: backend.clip_grad_norm_(params, threshold, math.inf),
        "with norm": lambda params: backend.clip_grads_with_norm_(params, threshold, total),
        "value": lambda params: backend.clip_grad_value_(params, threshold),
        "clamp": lambda params: backend.clamp_grad_(params, -threshold, None),
    }
    for name, call in calls.items():
        params = backend.parameters((4,), (3, 2), (0,), ())
        params += backend.parameters((2, 2), dtype=torch.bfloat16)
        params.append(parameter(random(6, 4, device=backend.device)[::2, 1::2]))
        before = [g._version for g in grads_of(params)]
        call(params)
        assert all(g._version > old for g, old in zip(grads_of(params), before)), name


def test_autograd_notices_a_gradient_it_had_saved(backend: Target) -> None:
    """Why the counter is bumped: a graph that saved .grad must not be run after clipping."""
    (param,) = backend.parameters((3,))
    param.grad.requires_grad_()
    penalty = param.grad.pow(2).sum()
    backend.clip_grad_norm_(param, 1e9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_get_total_norm_bumps_nothing(backend: Target) -> None:
    tensors = [backend.random(3), backend.random(4)]
    before = [t._version for t in tensors]
    with oracle.unchanged(tensors):
        backend.get_total_norm(tensors)
    assert [t._version for t in tensors] == before


READ_ONLY_SCRIPT = """
import math, mmap, sys, warnings
import torch, gradclip_ext
warnings.filterwarnings("ignore", message="The given buffer is not writable")
params = []
for path, dtype in zip(sys.argv[2:], (torch.float32, torch.bfloat16)):
    with open(path, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    params.append(torch.nn.Parameter(torch.empty(20_000, dtype=dtype)))
    params[-1].grad = torch.frombuffer(pages, dtype=dtype)
for norm_type in (0.5, 1.0, 2.0, 3.0, math.inf, -math.inf):
    norm = gradclip_ext.clip_grad_norm_(params, 1e30, norm_type, backend=sys.argv[1])
    gradclip_ext.clip_grads_with_norm_(params, 1e30, norm, backend=sys.argv[1])
    gradclip_ext.clip_grad_norm_(params, math.inf, norm_type, backend=sys.argv[1])
"""


@pytest.mark.parametrize("name", cpu_backends())
def test_memory_is_not_even_touched_when_nothing_is_clipped(name: str, tmp_path: Path) -> None:
    """Gradients in pages that the system forbids to write: one store ends the process."""
    files = []
    for dtype in (torch.float32, torch.bfloat16):
        files.append(tmp_path / str(dtype))
        files[-1].write_bytes(oracle.bits(random(20_000, dtype=dtype)).numpy().tobytes())
    run_python("-c", READ_ONLY_SCRIPT, name, *map(str, files), timeout=120)


# ---------------------------------------------------------------- one memory, several entries


def test_a_parameter_listed_twice_counts_once(backend: Target) -> None:
    """A tied weight. torch counts and scales it twice."""
    for name, call in backend.calls().items():
        params = backend.parameters((3,), (2, 2))
        twins = [parameter(g.clone()) for g in grads_of(params)]
        results = call([params[0], params[0], params[1], params[0], params[1]]), call(twins)
        if results[0] is not None:
            oracle.assert_same_bits(*results, what=name)
        for grad, twin in zip(grads_of(params), grads_of(twins)):
            oracle.assert_same_bits(grad, twin, name)


def test_parameters_that_share_a_gradient_both_count_and_its_memory_is_written_once(backend: Target) -> None:
    """autograd.grad of a + b hands out one tensor. torch counts it twice too, but also scales it twice."""
    for name, call in backend.calls().items():
        params = backend.parameters((3,), (2, 2))
        before = clones(grads_of(params))
        same = parameter(params[1].grad)  # another parameter with the same gradient
        alias = parameter(params[0].grad.view(3))  # another tensor object: same pointer, shape, strides
        shares = [params[0], params[1], same, alias]
        twins = [parameter(g) for g in (*clones(before), *clones(before[::-1]))]
        results = call(shares), call(twins)
        if results[0] is not None:
            oracle.assert_norm(results[0], [*before, *before], math.inf if "inf" in name else 2.0, name)
            oracle.assert_scaled(grads_of(params), before, results[0], 0.1, name)
        else:
            for grad, twin in zip(grads_of(params), grads_of(twins)):
                oracle.assert_same_bits(grad, twin, name)


def test_a_shared_gradient_beside_a_parameter_listed_twice(backend: Target) -> None:
    (a, b), c = backend.parameters((5,), (4,)), None
    before = clones([a.grad, b.grad])
    c = parameter(a.grad)
    norm = backend.clip_grad_norm_([a, b, a, c, b, c], 0.25)
    oracle.assert_norm(norm, [*before, before[0]], 2.0)
    oracle.assert_scaled([a.grad, b.grad], before, norm, 0.25)


def test_get_total_norm_counts_every_tensor(backend: Target) -> None:
    a, b = backend.random(3), backend.random(4)
    for norm_type in (0.0, 1.0, 2.0, math.inf):
        listed = [a, b, a, b.view(4), a.detach()]
        oracle.assert_norm(backend.get_total_norm(listed, norm_type), clones(listed), norm_type)


def test_same_memory_in_another_shape_or_dtype_is_no_duplicate(backend: Target) -> None:
    a = backend.random(6)
    for other in (a.view(2, 3), a[:3], a[::2], a.view(2, 3).t()):
        norm = backend.get_total_norm([a, other])
        oracle.assert_norm(norm, [a, other.clone()], 2.0)


def test_zero_size_gradients_are_never_duplicates(backend: Target) -> None:
    base = backend.random(4)
    params = [parameter(t) for t in (base[:0], base, base[:0], base[4:], base[:0].clone())]
    before = base.clone()
    norm = backend.clip_grad_norm_(params, 0.5)
    oracle.assert_norm(norm, [before], 2.0)
    oracle.assert_scaled([base], [before], norm, 0.5)


@pytest.mark.parametrize(
    "cut", [(slice(0, 6), slice(4, 10)), (slice(0, 10, 2), slice(0, 10, 3)), (slice(0, 10), slice(2, 5))]
)
def test_partial_overlap_is_scaled_in_list_order_as_in_torch(backend: Target, cut: tuple) -> None:
    ours, theirs = (torch.empty(10, device=backend.device) for _ in range(2))
    ours.copy_(backend.random(10))
    theirs.copy_(ours)
    lists = [[parameter(base[c]) for c in cut] for base in (ours, theirs)]
    expected = [p.grad.clone() for p in lists[0]]
    norm = backend.clip_grad_norm_(lists[0], 0.25)
    oracle.assert_norm(norm, expected, 2.0)
    torch.nn.utils.clip_grads_with_norm_(lists[1], 0.25, norm)
    oracle.assert_within_ulps(ours.cpu(), theirs.cpu(), 1)


def test_gradients_in_one_flat_buffer(backend: Target) -> None:
    """Neighbours that touch without overlapping, as data-parallel wrappers lay them out."""
    for dtype in (torch.float32, torch.bfloat16):
        flat = backend.random(103, dtype=dtype)
        before = flat.clone()
        params = [parameter(t) for t in (flat[1:41].view(8, 5), flat[41:42], flat[42:60].view(6, 3).t())]
        norm = backend.clip_grad_norm_(params, 0.5)
        oracle.assert_norm(norm, [before[1:60]], 2.0)
        oracle.assert_scaled([flat[1:60]], [before[1:60]], norm, 0.5)
        oracle.assert_same_bits(flat[0], before[0])
        oracle.assert_same_bits(flat[60:], before[60:])


def test_tied_weight_of_a_model(backend: Target) -> None:
    embed, head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
    head.weight = embed.weight
    model = torch.nn.ModuleList([embed, head]).to(backend.device)
    head(embed(torch.arange(7, device=backend.device))).pow(2).sum().backward()
    before = embed.weight.grad.clone()
    norm = backend.clip_grad_norm_([*embed.parameters(), *head.parameters(), *model.parameters()], 0.5)
    oracle.assert_norm(norm, [before], 2.0)
    oracle.assert_scaled([embed.weight.grad], [before], norm, 0.5)


# ---------------------------------------------------------------- autograd's modes


def test_inference_mode(backend: Target) -> None:
    for made_inside in (False, True):
        for clips in (True, False):
            for name, call in backend.calls().items():
                if not made_inside:
                    params = backend.parameters((3,), (2, 2))
                with torch.inference_mode():
                    if made_inside:
                        params = backend.parameters((3,), (2, 2))
                    scale = 1.0 if clips else 1e-6
                    twins = [parameter(g.mul_(scale).clone()) for g in grads_of(params)]
                    call(params)
                    call(twins)
                    for grad, twin in zip(grads_of(params), grads_of(twins)):
                        oracle.assert_same_bits(grad, twin, name)


def test_gradients_with_a_graph_of_their_own(backend: Target) -> None:
    """create_graph=True: accepted as in torch, and the graph stays attached."""
    x = random(4, device=backend.device)
    pairs = []
    for _ in range(2):
        param = torch.nn.Parameter(x.clone())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*create_graph=True")  # the cycle is broken below
            (param**3).sum().backward(create_graph=True)
        assert param.grad.grad_fn is not None
        pairs.append(param)
    ours, theirs = pairs
    norm = backend.clip_grad_norm_(ours, 0.5)
    torch_clip_grad_norm_(theirs, 0.5)
    assert not norm.requires_grad
    assert (ours.grad.requires_grad, ours.grad.is_leaf) == (theirs.grad.requires_grad, theirs.grad.is_leaf)
    oracle.assert_within_ulps(ours.grad.detach(), theirs.grad.detach(), 4)
    for call in backend.calls().values():
        call(ours)
    ours.grad = theirs.grad = None


def test_grad_mode_is_left_as_it_was() -> None:
    params = [parameter(random(3))]
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            before = torch.is_grad_enabled()
            gradclip_ext.clip_grad_norm_(params, 1.0)
            with pytest.raises(ValueError):
                gradclip_ext.clip_grad_norm_(params, -1.0)
            assert torch.is_grad_enabled() is before


# ---------------------------------------------------------------- threads


def test_two_threads_clip_different_lists(backend: Target) -> None:
    sources = [[backend.random(50, 7), backend.random(11)] for _ in range(2)]

    def clip(source: list[Tensor]) -> list[Tensor]:
        params = [parameter(g.clone()) for g in source]
        return [backend.clip_grad_norm_(params, 0.5), *grads_of(params)]

    expected = [clip(source) for source in sources]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(50):
                for one, other in zip(clip(sources[index]), expected[index]):
                    oracle.assert_same_bits(one, other)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
