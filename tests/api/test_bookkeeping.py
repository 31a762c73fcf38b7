"""Everything but the values: what is returned, what is written, what does not change."""

from __future__ import annotations

import math
import threading
import warnings
from pathlib import Path

import oracle
import pytest
import torch
from cases import Target, cpu_backends, grads_of, random
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
    """The norm of a single 0-d gradient has its value, but not its memory."""
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
    """The reason for the version counter: a graph that saved .grad must not run after clipping."""
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
