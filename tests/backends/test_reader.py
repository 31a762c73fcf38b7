"""How tensors are read for kernels: by the compiled module, or by Python for an older torch."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from cases import REAL_DTYPES, SEED, name_of
from oracle import parameter
from torch import Tensor

import gradclip_ext
from gradclip_ext import _extension, backends, gradients, norms
from gradclip_ext.backends.base import TensorList, is_regular
from gradclip_ext.backends.compiled import CpuBackend

if _extension.C is None:
    pytest.skip(f"needs the compiled module, but {_extension.REASON}", allow_module_level=True)

C = _extension.C
needs_reader = pytest.mark.skipif(
    not C.CAN_READ, reason=f"torch {torch.__version__} has no DLPack exchange API"
)


def with_grads(*grads: Tensor) -> list[torch.nn.Parameter]:
    return [parameter(grad) for grad in grads]


def selection(name: str | None = "cpu") -> backends.Selection:
    return backends.Selection(name, None, is_intercepted=False)


# ---------------------------------------------------------------- gradients()


def test_gradients_in_order_without_the_missing_ones() -> None:
    params = [*with_grads(torch.ones(1), torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    params.append(params[0])
    found = C.gradients(params)
    assert [id(g) for g in found] == [id(params[i].grad) for i in (0, 1, 0)]
    assert C.gradients([]) == []


def test_gradients_through_an_attribute_of_a_subclass() -> None:
    """Only Tensor and Parameter have torch's own ``grad``; others are asked by name."""

    class Other(Tensor):
        @property
        def grad(self) -> Tensor:
            return torch.full((2,), 7.0)

    assert C.gradients([torch.ones(2).as_subclass(Other)])[0].tolist() == [7.0, 7.0]
    with pytest.raises(AttributeError, match="grad"):
        C.gradients([torch.ones(1), object()])


# ---------------------------------------------------------------- what the kernels can read


class Subclass(Tensor):
    pass


def lazy_negative() -> Tensor:
    return torch.randn(3, dtype=torch.complex64).conj().imag


def dense_lazy_negative() -> Tensor:
    return torch._neg_view(torch.full((3,), 2.0))


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


REGULAR: dict[str, Callable[[], Tensor]] = {
    "0-d": lambda: torch.tensor(2.0),
    "empty": lambda: torch.zeros(0, 3),
    "transposed": lambda: torch.randn(3, 4).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "size 1 with any stride": lambda: torch.randn(8).as_strided((1, 4), (3, 1)),
    "middle of a buffer": lambda: torch.randn(20)[3:11],
    "parameter": lambda: torch.nn.Parameter(torch.randn(3)),
}
IRREGULAR: dict[str, Callable[[], Tensor]] = {
    "complex": lambda: torch.randn(3, dtype=torch.complex64),
    "gaps": lambda: torch.randn(10)[::2],
    "expanded": lambda: torch.randn(1).expand(5),
    "lazy negative with gaps": lazy_negative,
    "zero tensor": lambda: torch._efficientzerotensor((3,)),
}
REFUSED: dict[str, Callable[[], object]] = {
    "integer": lambda: torch.arange(3),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "subclass": lambda: torch.randn(3).as_subclass(Subclass),
    "not a tensor": lambda: None,
}


@needs_reader
@pytest.mark.parametrize("what", REGULAR)
def test_read_like_python(what: str) -> None:
    tensors = [torch.ones(5), REGULAR[what](), torch.ones(2, dtype=torch.bfloat16)]
    native = C.read_tensors(tensors, True)
    listed = TensorList(tensors)
    assert native is not None and native.columns == listed.columns()
    assert TensorList(tensors, native).dtypes == listed.dtypes
    assert not native.is_cuda and native.has_elements and all(map(is_regular, tensors))


@needs_reader
@pytest.mark.parametrize("what", [*IRREGULAR, *REFUSED])
def test_the_reader_declines(what: str) -> None:
    other = {**IRREGULAR, **REFUSED}[what]()
    for position in range(3):
        listed = [torch.ones(5), torch.ones(2)]
        listed.insert(position, other)
        assert C.read_tensors(listed, False) is None
    if what in IRREGULAR:
        assert not is_regular(other)


@needs_reader
def test_inference_tensors_are_read_only_where_nothing_is_written() -> None:
    listed = [torch.ones(2), inference_tensor()]
    assert C.read_tensors(listed, True) is None
    assert C.read_tensors(listed, False) is not None


@needs_reader
@pytest.mark.parametrize("first", [torch.ones, lambda _: inference_tensor()], ids=["some", "all"])
def test_kernels_clip_inference_tensors_inside_the_mode(first: Callable[[int], Tensor]) -> None:
    params = with_grads(first(2), inference_tensor())
    with torch.inference_mode():
        found = gradients.read_gradients(params, selection())
        assert found is not None and [b.name for b, _ in found._parts] == ["cpu"]


@needs_reader
def test_shared_memory_is_read_only_where_nothing_is_written() -> None:
    base = torch.full((5,), 2.0)
    for shared in ([base, base], [base, base.view(5)], [base, base[1:]], [base[1:3], torch.ones(1), base]):
        assert C.read_tensors(shared, True) is None
        assert C.read_tensors(shared, False) is not None
    neighbours = [base[:2], base[2:], base[:0]]
    assert C.read_tensors(neighbours, True) is not None


# ---------------------------------------------------------------- tensors that kernels do not take


@needs_reader
@pytest.mark.parametrize("what", IRREGULAR)
def test_only_what_kernels_do_not_take_is_set_apart(what: str) -> None:
    other = IRREGULAR[what]()
    listed = [torch.ones(5), other, torch.ones(2), torch.ones(0), other.clone()]
    positions, others = C.set_apart(listed, False)
    regular = [i for i, t in enumerate(listed) if t is not other and (i < 4 or is_regular(t))]
    assert positions == [regular] and others == [i for i in range(5) if i not in regular]


@needs_reader
@pytest.mark.parametrize("what", [w for w in IRREGULAR if w not in ("expanded", "zero tensor")])
def test_a_tensor_set_apart_is_clipped_beside_the_others(what: str) -> None:
    grads = [torch.randn(5), IRREGULAR[what]().clone(), torch.randn(3, dtype=torch.float64)]
    if what == "gaps":
        grads[1] = torch.randn(10)[::2]
    params = with_grads(*grads)
    assert next(iter(gradients.read_gradients(params, selection()).handled_by()))[0] == "cpu"
    expected = [g.clone() for g in grads]
    exact = math.hypot(*(g.to(torch.complex128).norm().item() for g in grads))
    norm = gradclip_ext.clip_grad_norm_(params, exact / 2, backend="cpu")
    assert norm.item() == pytest.approx(exact, rel=1e-6)
    for grad, old in zip(grads, expected):
        torch.testing.assert_close(grad, old * 0.5, rtol=1e-6, atol=1e-9)


@needs_reader
def test_memory_shared_with_a_tensor_set_apart() -> None:
    """Then order matters: everything goes the general way, where a tied parameter counts once."""
    base = torch.full((12,), 2.0)
    for shared in ([base, base[::3]], [base[::3], base[6:]], [base[::2], base[::3], torch.ones(2)]):
        params = with_grads(torch.ones(4), *shared)
        assert gradients._read_native([p.grad for p in params], selection(), written=True) is None
        assert gradients._read_native([p.grad for p in params], selection(), written=False) is not None
    apart = parameter(base[::2])
    norm = gradclip_ext.clip_grad_norm_([apart, *with_grads(torch.ones(4)), apart], 1.0)
    assert norm.item() == pytest.approx(math.sqrt(6 * 4.0 + 4))
    neighbours = with_grads(base[:4], base[4:10:2], base[10:])
    assert gradients._read_native([p.grad for p in neighbours], selection(), written=True) is not None


@needs_reader
def test_errors_of_tensors_set_apart_name_their_position() -> None:
    params = with_grads(torch.ones(4), torch.ones(6)[::2], torch.ones(1).expand(5))
    with pytest.raises(RuntimeError, match=r"gradient 2 \(shape \(5,\)\)"):
        gradclip_ext.clip_grad_norm_(params, 1.0)


def test_lazy_negatives_are_told_apart() -> None:
    """DLPack does not show the negative bit: a clamp has to check it, a norm or a product does not."""
    assert C.any_negative([torch.ones(2), dense_lazy_negative()])
    assert C.any_negative([lazy_negative()])
    assert not C.any_negative([torch.ones(2), torch.randn(3, dtype=torch.complex64).conj()])


def test_columns_and_back() -> None:
    tensors = [torch.ones(3), torch.ones(0), torch.ones(2, dtype=torch.float16)]
    columns = TensorList(tensors).columns()
    assert len(columns) == 2 * 17, "an empty tensor has no memory to read"
    assert C.from_columns(tensors, columns, [], 0b1001, False, 0).columns == columns
    with pytest.raises(ValueError, match="17 bytes"):
        C.from_columns(tensors, columns[1:], [], 0b1001, False, 0)


# ---------------------------------------------------------------- who handles what


@pytest.mark.parametrize("what", [k for k in IRREGULAR if k != "zero tensor"])
def test_an_irregular_tensor_leaves_the_others_to_the_kernels(what: str) -> None:
    listed = [torch.ones(5), IRREGULAR[what](), torch.zeros(0), torch.ones(2, 3).double()]
    found = gradients.read_tensors(listed, selection())
    assert found is not None
    parts = [(backend.name, tensors.tensors) for backend, tensors in found._parts]
    # Of complex numbers, kernels take the real and the imaginary parts.
    assert [name for name, _ in parts] == ["cpu", "cpu" if what == "complex" and C.CAN_READ else "foreach"]
    assert [id(t) for t in parts[0][1]] == [id(listed[i]) for i in (0, 2, 3)]
    assert [id(t) for t in parts[1][1]] == [id(listed[1])]


def test_regular_tensors_are_one_part() -> None:
    listed = [make() for make in REGULAR.values()]
    found = gradients.read_tensors(listed, selection())
    assert found is not None and [(b.name, len(t.tensors)) for b, t in found._parts] == [("cpu", len(listed))]


@needs_reader
def test_what_has_no_gradient_decides_nothing() -> None:
    """A frozen parameter of a subclass, as quantisation makes them, must not slow the list down."""

    class Quantized(torch.nn.Parameter):
        pass

    frozen = Quantized(torch.zeros(8), requires_grad=False)
    params = [frozen, *with_grads(torch.ones(3)), torch.ones(2, 2).to_sparse(), *with_grads(torch.ones(4))]
    found = gradients.read_gradients(params, selection())
    assert found is not None
    ((backend, listed),) = found._parts
    assert backend.name == "cpu" and listed._native is not None and len(listed.tensors) == 2


def test_devices_are_parts() -> None:
    listed = [torch.ones(2), torch.empty(3, device="meta"), torch.ones(1)]
    found = gradients.read_tensors(listed, selection(None))
    assert found is not None
    assert [(t.device.type, len(t.tensors)) for _, t in found._parts] == [("cpu", 2), ("meta", 1)]


def test_gradients_that_overlap_are_written_by_foreach_in_list_order() -> None:
    base = torch.ones(5)
    found = gradients.read_gradients(with_grads(base, base[1:]), selection())
    assert found is not None and [b.name for b, _ in found._parts] == ["foreach"]


def test_gradients_that_are_the_same_memory_are_written_once_by_the_kernels() -> None:
    base = torch.ones(5)
    found = gradients.read_gradients(with_grads(base, base.view(5), torch.ones(2)), selection())
    assert found is not None and [(b.name, len(t.tensors)) for b, t in found._parts] == [("cpu", 3)]
    assert [(b.name, len(t.tensors)) for b, t in found._written] == [("cpu", 2)]


def test_orders_without_a_kernel_are_for_foreach(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the kernels know orders > 0 only")

    monkeypatch.setattr(CpuBackend, "norm", refuse)
    for norm_type in (0.0, -0.0, -1.0, -math.inf, math.nan):
        found = gradclip_ext.get_total_norm([torch.full((3,), 2.0)], norm_type, backend="cpu").item()
        expected = torch.nn.utils.get_total_norm([torch.full((3,), 2.0)], norm_type).item()
        assert found == pytest.approx(expected, nan_ok=True)
    with pytest.raises(AssertionError, match="orders > 0"):
        gradclip_ext.get_total_norm([torch.ones(3)], 0.5, backend="cpu")


# ---------------------------------------------------------------- whole calls on the kernels


def test_every_version_counter_moves_once() -> None:
    for call in (
        lambda p: gradclip_ext.clip_grad_norm_(p, 0.1, backend="cpu"),
        lambda p: gradclip_ext.clip_grad_norm_(p, 1e9, backend="cpu"),
        lambda p: gradclip_ext.clip_grad_norm_(p, math.inf, backend="cpu"),
        lambda p: gradclip_ext.clip_grads_with_norm_(p, 0.1, torch.tensor(3.0), backend="cpu"),
        lambda p: gradclip_ext.clamp_grad_(p, -0.1, 0.1, backend="cpu"),
        lambda p: gradclip_ext.clamp_grad_(p, -9.0, 9.0, backend="cpu"),
    ):
        params = with_grads(torch.ones(3), torch.zeros(0), torch.ones(1 << 19))
        call(params)
        assert [p.grad._version for p in params if p.grad is not None] == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_the_rule_is_the_same_in_python_and_in_the_kernels(dtype: torch.dtype) -> None:
    """norms.Rule and csrc/core/rule.h, bit for bit."""
    rng = random.Random(SEED)
    special = [0.0, math.inf, math.nan, 1e-45, 3e38]
    differ = 0
    for _ in range(1000):
        value = rng.choice([10 ** rng.uniform(-9, 9)] * 5 + special)
        grad = torch.tensor([value], dtype=dtype)
        max_norm = rng.choice([grad.item() * rng.random()] * 9 + [grad.item(), 0.0, 1e300, math.inf])
        if math.isnan(max_norm):
            continue
        # One element and order inf: the norm is exact.
        listed = TensorList([grad]).native()
        norm, coef = C.cpu_norm(listed, math.inf, max_norm, dtype is torch.float64)
        expected = norms.Rule(max_norm).clip_coef(torch.tensor(norm, dtype=dtype))
        expected = expected.item() if isinstance(expected, Tensor) else expected
        assert coef == expected or (math.isnan(coef) and math.isnan(expected)), (value, max_norm)
        differ += expected not in (0.0, 1.0) and not math.isnan(expected)
    assert differ > 200, "hardly any coefficient tells the two apart"


def test_results_are_new_and_of_the_right_dtype() -> None:
    params = with_grads(torch.ones(4), torch.ones(4, dtype=torch.bfloat16))
    first, second = (gradclip_ext.clip_grad_norm_(params, math.inf, backend="cpu") for _ in range(2))
    assert first.data_ptr() != second.data_ptr() and first.dtype == torch.float32 and first.dim() == 0
    assert not first.requires_grad and first._version == 0
    with_wide = [*params, *with_grads(torch.zeros(0, dtype=torch.float64))]
    assert gradclip_ext.clip_grad_norm_(with_wide, 9.0, backend="cpu").dtype == torch.float64


@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=name_of)
def test_the_kernels_get_the_list_from_python_too(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the exchange API (torch < 2.10) Python reads the columns. Kernels and bits are the same."""
    grads = [torch.randn(7, 5).to(dtype), torch.randn(0).to(dtype), torch.randn(6, 3).to(dtype).t()]
    runs = []
    for can_read in (C.CAN_READ, False):
        monkeypatch.setattr(C, "CAN_READ", can_read)
        params = with_grads(*(g.clone() for g in grads))
        norm = gradclip_ext.clip_grad_norm_(params, 0.5, backend="cpu")
        runs.append([norm, *(p.grad for p in params)])
    assert all(torch.equal(one, other) for one, other in zip(*runs))
