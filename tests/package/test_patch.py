"""patch_torch and unpatch_torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import oracle
import pytest
import torch
import torch.nn.utils.clip_grad
from cases import clones, grads_of, parameters, random
from oracle import parameter
from subprocesses import run_python

import gradclip_ext
from gradclip_ext import patch_torch, unpatch_torch

NAMES = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm")
PLACES = [
    (module, name)
    for module in (torch.nn.utils, torch.nn.utils.clip_grad)
    for name in (*NAMES, "_get_total_norm", "_clip_grads_with_norm_")
    if hasattr(module, name)
]
ORIGINALS = [getattr(module, name) for module, name in PLACES]


def patched() -> bool:
    """Tell whether all places hold our functions; anything in between fails."""
    here = [getattr(module, name) for module, name in PLACES]
    ours = [getattr(gradclip_ext, name.removeprefix("_")) for _, name in PLACES]
    assert here in (ours, ORIGINALS)
    return here == ours


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    assert not patched()
    yield
    unpatch_torch()
    assert not patched()


def test_there_is_something_to_patch() -> None:
    assert len(PLACES) == 8, PLACES


def test_patch_and_unpatch() -> None:
    patch_torch()
    assert patched()
    unpatch_torch()
    assert not patched()


def test_idempotent_and_not_counted() -> None:
    for _ in range(3):
        patch_torch()
        assert patched()
    unpatch_torch()
    assert not patched()
    unpatch_torch()
    assert not patched()


def test_with() -> None:
    with patch_torch():
        assert patched()
    assert not patched()


def test_nested_with_restores_what_was_there() -> None:
    with patch_torch():
        with patch_torch():
            assert patched()
        assert patched()
    assert not patched()


def test_with_inside_a_lasting_patch() -> None:
    patch_torch()
    with patch_torch():
        assert patched()
    assert patched()


def test_unpatch_inside_with() -> None:
    with patch_torch():
        unpatch_torch()
        assert not patched()
        with patch_torch():
            assert patched()
        assert not patched()
    assert not patched()


def test_with_on_one_object_twice() -> None:
    patch = patch_torch()
    with patch:
        with patch:
            assert patched()
        assert patched()
    assert not patched()
    with patch:
        assert patched()
    assert not patched()


def test_entered_later_restores_what_was_there_on_entry() -> None:
    patch = patch_torch()
    unpatch_torch()
    with patch:
        assert patched()
    assert not patched()


def test_exception_leaves_with() -> None:
    with pytest.raises(KeyError), patch_torch():
        raise KeyError
    assert not patched()


def test_someone_elses_replacement_survives_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*args: object) -> None: ...

    monkeypatch.setattr(torch.nn.utils, "clip_grad_value_", other)
    with patch_torch():
        assert torch.nn.utils.clip_grad_value_ is gradclip_ext.clip_grad_value_
    assert torch.nn.utils.clip_grad_value_ is other
    monkeypatch.undo()


def test_reaches_code_that_looks_up_at_call_time() -> None:
    """bfloat16 tells whose function ran: torch returns its norm in bfloat16, ours in float32."""
    for module in (torch.nn.utils, torch.nn.utils.clip_grad):
        for patch, dtype in ((False, torch.bfloat16), (True, torch.float32)):
            if patch:
                patch_torch()
            params = parameters((30,), (4,), dtype=torch.bfloat16)
            before = clones(grads_of(params))
            norm = module.clip_grad_norm_(
                params, max_norm=0.5, norm_type=2.0, error_if_nonfinite=True, foreach=True
            )
            assert norm.dtype == dtype
            if patch:
                oracle.assert_norm(norm, before, 2.0)
                oracle.assert_scaled(grads_of(params), before, norm, 0.5)
        unpatch_torch()


def test_reaches_the_two_halves_by_their_private_names() -> None:
    """As verl has them, imported when they are called. torch's norm of these is inf, and all gradients 0."""
    param = parameter(torch.full((100_000,), 300.0, dtype=torch.float16))
    before = clones(grads_of([param]))
    with patch_torch():
        halves = torch.nn.utils.clip_grad
        norm = halves._get_total_norm([param.grad], 2.0, False, None)
        halves._clip_grads_with_norm_([param], 1.0, norm, None)
    oracle.assert_norm(norm, before, 2.0)
    oracle.assert_scaled(grads_of([param]), before, norm, 1.0)


@pytest.mark.filterwarnings("ignore:.*clip_grad_norm.*deprecated:FutureWarning")
def test_deprecated_alias_reaches_us_too() -> None:
    param = parameter(random(5, dtype=torch.bfloat16))
    with patch_torch():
        assert torch.nn.utils.clip_grad_norm(param, 0.5).dtype == torch.float32


def test_whole_api_while_patched() -> None:
    """Ours must not look torch's functions up again: a dispatch subclass would recurse."""
    with patch_torch():
        params = parameters((3,), (4,))
        norm = torch.nn.utils.get_total_norm(grads_of(params))
        torch.nn.utils.clip_grads_with_norm_(params, 0.5, norm)
        torch.nn.utils.clip_grad_value_(params, 0.1)
        assert max(g.abs().max() for g in grads_of(params)) <= 0.1 + 1e-7
        with torch._subclasses.FakeTensorMode():
            fake = torch.nn.Parameter(torch.ones(3))
            fake.grad = torch.ones(3)
            assert torch.nn.utils.clip_grad_norm_(fake, 1.0).shape == ()
            torch.nn.utils.clip_grad_value_(fake, 1.0)


def test_unpatch_inside_with_inside_a_lasting_patch() -> None:
    patch_torch()
    with patch_torch():
        unpatch_torch()
        assert not patched()
    assert patched()
    unpatch_torch()
    assert not patched()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that imported torch's functions before there was a patch, one under another name."""
    module = ModuleType("some_library")
    monkeypatch.setitem(sys.modules, "some_library", module)
    imports = "from torch.nn.utils import clip_grad_norm_, clip_grad_value_ as clamp, get_total_norm\n"
    exec(imports + "def get_total_norms(): ...", vars(module))
    return module


def holds_ours(library: ModuleType) -> bool:
    ours = (gradclip_ext.clip_grad_norm_, gradclip_ext.clip_grad_value_, gradclip_ext.get_total_norm)
    here = (library.clip_grad_norm_, library.clamp, library.get_total_norm)
    assert here in (ours, tuple(map(ORIGINALS.__getitem__, (0, 1, 3))))
    return here == ours


def test_reaches_modules_that_imported_a_function_earlier(library: ModuleType) -> None:
    own = library.get_total_norms
    patch = patch_torch()
    assert holds_ours(library)
    assert library.get_total_norms is own
    names = [f"some_library.{name}" for name in ("clamp", "clip_grad_norm_", "get_total_norm")]
    assert sorted(place for place in patch.places if place.startswith("some_library")) == names
    assert set(patch.places) >= {"torch.nn.utils.clip_grad_norm_", "torch.nn.utils.clip_grad._get_total_norm"}
    unpatch_torch()
    assert not holds_ours(library)
    assert patch.places == []


def test_finds_a_module_that_was_imported_between_two_patches(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "some_library")
    patch_torch()
    assert not holds_ours(library)
    sys.modules["some_library"] = library  # monkeypatch puts back what was there before the fixture
    patch_torch()
    assert holds_ours(library)
    unpatch_torch()
    assert not holds_ours(library)


def test_with_restores_modules_that_imported_a_function_earlier(library: ModuleType) -> None:
    with patch_torch():
        assert holds_ours(library)
        with patch_torch():
            assert holds_ours(library)
        assert holds_ours(library)
        unpatch_torch()
        assert not holds_ours(library)
    assert not holds_ours(library)


def test_reaches_them_beside_another_librarys_wrapper(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then torch's module no longer holds the function that such a module has."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: None)
    monkeypatch.setattr(torch.nn.utils.clip_grad, "clip_grad_norm_", lambda *args: None)
    with patch_torch():
        assert holds_ours(library)
    assert not holds_ours(library)
    monkeypatch.undo()


def test_objects_among_the_modules_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some libraries put objects into sys.modules, whose attributes may import or warn."""
    found = SimpleNamespace(clip_grad_norm_=torch.nn.utils.clip_grad_norm_)
    monkeypatch.setitem(sys.modules, "some_object", found)  # type: ignore[arg-type]
    with patch_torch():
        assert found.clip_grad_norm_ is not gradclip_ext.clip_grad_norm_


RELOAD_SCRIPT = """
import importlib, sys
import torch, gradclip_ext
from torch.testing._internal.two_tensor import TwoTensor

own = {name: getattr(torch.nn.utils, name) for name in sys.argv[2:]}
gradclip_ext.patch_torch()
if sys.argv[1] == "reload":
    for name in [n for n in sys.modules if n.startswith("gradclip_ext.") and sys.modules[n] is not None]:
        if name.rpartition(".")[2] in ("_torch_functions", "clip", "patch"):
            importlib.reload(sys.modules[name])
    importlib.reload(gradclip_ext)
else:  # another library wraps what it finds, and that is ours
    found = torch.nn.utils.clip_grad_norm_
    torch.nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad.clip_grad_norm_ = lambda *a, **k: found(*a, **k)

value = torch.tensor([6.0, 8.0])
param = torch.nn.Parameter(TwoTensor(torch.zeros(2), torch.zeros(2)))
param.grad = TwoTensor(value.clone(), value.clone())
norm = torch.nn.utils.clip_grad_norm_([param], 5.0)
assert abs(norm.a.item() - 10) < 1e-5 and torch.allclose(param.grad.a, value / 2), (norm, param.grad)
gradclip_ext.unpatch_torch()
assert all(getattr(torch.nn.utils, name) is function for name, function in own.items())
"""


@pytest.mark.parametrize("what", ["reload", "wrap"])
def test_a_tensor_subclass_never_recurses_into_the_patch(what: str) -> None:
    """Such tensors go to torch's own functions, whatever the patch and other code have replaced."""
    run_python("-c", RELOAD_SCRIPT, what, *NAMES, timeout=60)
