"""Comparisons the tests share: positions of NaN and inf first, then values within a derived budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# torch's own functions, held from before any test of patch_torch could replace them.
from torch.nn.utils import clip_grad_norm_ as torch_clip_grad_norm_
from torch.nn.utils import get_total_norm as torch_get_total_norm

from gradclip_ext import reference

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Roundings, in eps of the dtype, that a norm of at most a few thousand elements may carry. float32:
# a row is added in running sums of about 64 terms each; their roundings of half an eps, taken as a
# random walk, are sqrt(64) / 2 = 4 eps, the root halves that, and 8 leaves a factor of four. It also
# is the promised 1e-6: 8 * 2^-23 = 9.5e-7. float64: |x|^p, 1/p and the sum each cost one or two, and
# the oracle pays the same.
NORM_EPS = 8


def wide(tensor: Tensor) -> Tensor:
    """Return a float64 (complex128) copy on the CPU."""
    return tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)


def real(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, a complex one as pairs of real numbers."""
    tensor = tensor.detach().cpu()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


# ---------------------------------------------------------------- bits


def bits(tensor: Tensor) -> Tensor:
    """Return the values of a tensor as integers of the same size."""
    plain = real(tensor).contiguous()
    return plain.view(_INTEGERS[plain.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (
        f"{what}: {actual.dtype} {tuple(actual.shape)} beside {expected.dtype} {tuple(expected.shape)}"
    )
    same = bits(actual) == bits(expected)
    assert bool(same.all()), (
        f"{what}: {int((~same).sum())} of {same.numel()} values differ\n{actual}\n{expected}"
    )


def whole_storage(tensor: Tensor) -> Tensor:
    """Return the memory under a tensor, what lies between its elements included, as a flat tensor."""
    storage = tensor.detach().untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (count,))


def gaps(tensor: Tensor) -> Tensor:
    """Return a copy of everything in the tensor's storage that is not an element of it."""
    whole = whole_storage(tensor)
    outside = torch.ones(whole.numel(), dtype=torch.bool)
    own = torch.arange(whole.numel()).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    outside[own.reshape(-1)] = False
    return whole.cpu()[outside]


@contextmanager
def unchanged(tensors: Sequence[Tensor], what: str = "") -> Iterator[None]:
    """Assert that the block leaves every tensor, and the memory around it, bit for bit as it was."""
    before = [whole_storage(t).clone() for t in tensors]
    yield
    for index, (tensor, old) in enumerate(zip(tensors, before)):
        assert_same_bits(whole_storage(tensor), old, f"{what}: tensor {index} changed")


# ---------------------------------------------------------------- values


def assert_same_specials(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Assert that NaN, inf and -inf are at the same positions, which a tolerance does not cover."""
    for name in ("isnan", "isposinf", "isneginf"):
        here, there = getattr(torch, name)(real(actual)), getattr(torch, name)(real(expected))
        assert torch.equal(here, there), f"{what}: {name} differs\n{actual}\n{expected}"


def ulp_distance(actual: Tensor, expected: Tensor) -> Tensor:
    """Return how many representable values lie between two tensors of one dtype; 0 where not finite."""
    a, b = (_ordered(t) for t in (actual, expected))
    finite = torch.isfinite(real(actual)) & torch.isfinite(real(expected))
    return torch.where(finite, (a - b).abs(), torch.zeros_like(a))


def _ordered(tensor: Tensor) -> Tensor:
    """Map floats to integers so that neighbours differ by one and -0 equals 0."""
    raw = bits(tensor)
    magnitude = (raw & torch.iinfo(raw.dtype).max).long()
    return torch.where(raw < 0, -magnitude, magnitude)


def assert_within_ulps(actual: Tensor, expected: Tensor, ulps: int, what: str = "") -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, (
        f"{what}: {actual.dtype} {tuple(actual.shape)} beside {expected.dtype} {tuple(expected.shape)}"
    )
    assert_same_specials(actual, expected, what)
    distance = ulp_distance(actual, expected)
    assert not distance.numel() or int(distance.max()) <= ulps, (
        f"{what}: off by {int(distance.max())} ulp\n{actual}\n{expected}"
    )


def assert_budget(
    actual: Tensor, exact: Tensor, torchs: Tensor, eps: float, tiny: float, *, what: str
) -> None:
    """Assert |ours - exact| <= 2 |torch - exact| + eps |exact| + tiny, with ``exact`` in float64."""
    assert_same_specials(actual.to(exact.dtype), exact, what)
    ours, theirs = (real(t.to(exact.dtype)) - real(exact) for t in (actual.cpu(), torchs.cpu()))
    allowed = 2 * theirs.abs() + eps * real(exact).abs() + tiny
    worse = torch.isfinite(real(exact)) & ~(ours.abs() <= allowed)
    assert not worse.any(), f"{what}: error {ours[worse]} beyond {allowed[worse]} (torch {theirs[worse]})"


# ---------------------------------------------------------------- clipping by norm


def result_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return float64 as soon as one tensor is float64 or complex128, else float32."""
    is_float64 = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return torch.float64 if is_float64 else torch.float32


def norm_eps(tensors: Sequence[Tensor]) -> float:
    """Return the error budget of a norm: float64 accuracy takes float64 gradients throughout."""
    all_float64 = all(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return NORM_EPS * torch.finfo(torch.float64 if all_float64 else torch.float32).eps


def upcast(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies in float32 where the dtype is a half type: there torch's norm is right too."""
    return [t.detach().float() if t.element_size() == 2 else t.detach().clone() for t in tensors]


def without_empty(tensors: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    """Drop zero-size tensors where torch refuses them (norm_type inf, -inf and negative)."""
    refuses = math.isinf(norm_type) or norm_type < 0
    return [t for t in tensors if t.numel() or not refuses]


def torch_norm(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return torch's norm, taken where torch is right: half types upcast, empty tensors dropped."""
    return torch_get_total_norm(without_empty(upcast(tensors), norm_type), norm_type).cpu()


def assert_norm(norm: Tensor, tensors: Sequence[Tensor], norm_type: float, what: str = "") -> None:
    """Assert that ``norm`` is the joint norm of ``tensors``, and a tensor a caller may keep."""
    dtype = result_dtype(tensors)
    exact = torch.tensor(reference.total_norm(tensors, norm_type), dtype=torch.float64)
    assert norm.shape == () and norm.dtype == dtype, f"{what}: {norm!r}, expected {dtype}"
    assert norm.device == tensors[0].device and not norm.requires_grad and norm.grad_fn is None, what
    theirs = torch_norm(tensors, norm_type)
    # Norms that the returned dtype rounds to zero are exempt.
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert_budget(norm, exact.to(dtype).double(), theirs, norm_eps(tensors), tiny, what=what)
    if math.isfinite(exact) and exact > torch.finfo(dtype).smallest_normal:
        error = abs(norm.double().item() / exact.item() - 1)
        assert error <= 1e-6, f"{what}: relative error {error:.2e} of the norm {exact.item()}"


def coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Return the coefficient that follows from a returned norm, by torch's recipe in its own order."""
    if math.isinf(max_norm):
        return torch.ones_like(norm)
    return torch.clamp((norm + 1e-6).reciprocal() * max_norm, max=1.0)


def assert_scaled(
    grads: Sequence[Tensor], before: Sequence[Tensor], norm: Tensor, max_norm: float, what: str = ""
) -> None:
    """Assert that every gradient is the float64 product with the coefficient, rounded once, to 1 ulp."""
    coef = coefficient(norm, max_norm).double().cpu()
    for index, (grad, old) in enumerate(zip(grads, before)):
        where = f"{what} gradient {index}"
        if coef >= 1:
            assert_same_bits(grad, old, where)
        else:
            assert_within_ulps(grad.cpu(), (wide(old) * coef).to(old.dtype), 1, where)


def assert_clipped_like_torch(
    grads: Sequence[Tensor], before: Sequence[Tensor], max_norm: float, norm_type: float, what: str = ""
) -> None:
    """Assert the error budget of whole results: norm, coefficient and product together."""
    dtype = result_dtype(before)
    exact_norm = reference.total_norm(before, norm_type)
    coef = reference.clip_coef(max_norm, exact_norm)
    twins = [parameter(t) for t in without_empty(upcast(before), norm_type)]
    torch_clip_grad_norm_(twins, max_norm, norm_type)
    kept = [(g, b) for g, b in zip(grads, before) if len(without_empty([b], norm_type))]
    for index, ((grad, old), twin) in enumerate(zip(kept, twins, strict=True)):
        # The norm's roundings, then half an eps each for the sum with 1e-6, the reciprocal, the
        # product with max_norm and the product with the gradient; a half type rounds once more.
        info = torch.finfo(old.dtype)
        eps = norm_eps(before) + 2 * torch.finfo(dtype).eps + info.eps
        exact = reference.scale([old], coef)[0]
        assert twin.grad is not None
        tiny = info.smallest_normal * info.eps
        assert_budget(grad, exact, wide(twin.grad), eps, tiny, what=f"{what} gradient {index} against torch")


def parameter(grad: Tensor) -> torch.nn.Parameter:
    """Return a parameter that holds ``grad`` itself as its gradient."""
    differentiable = grad.is_floating_point() or grad.is_complex()
    param = torch.nn.Parameter(torch.empty_like(grad), requires_grad=differentiable)
    param.grad = grad
    return param
