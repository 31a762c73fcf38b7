"""Fixtures and settings for the whole suite; see cases.py for what is tested and oracle.py for how."""

from __future__ import annotations

import gc
import zlib

import compiled_module  # noqa: F401  (before gradclip_ext)
import hypothesis
import pytest
import torch
from cases import SEED, Target, targets

from gradclip_ext import _extension
from gradclip_ext.backends import foreach_cpu

hypothesis.settings.register_profile(
    "gradclip_ext",
    deadline=None,
    max_examples=60,
    print_blob=True,
    # `backend` patches a function per test, not per example, and that is meant.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("gradclip_ext")


def pytest_configure(config: pytest.Config) -> None:
    # torch says so wherever it takes a norm of order 0 of complex numbers, although the count is right.
    config.addinivalue_line("filterwarnings", "ignore:Casting complex values to real:UserWarning")


SEED_LINE = f"seed of random inputs and of hypothesis: {SEED} (repeat with GRADCLIP_EXT_TEST_SEED={SEED})"


def pytest_report_header() -> list[str]:
    cuda = "available" if torch.cuda.is_available() else "not available"
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA {cuda}", SEED_LINE]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not terminalreporter.showheader:  # with -q there was no header
        terminalreporter.write_line(SEED_LINE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the test that takes longest, a suite of its own: in parallel, others run beside it then."""
    items.sort(key=lambda item: item.path.name != "test_triton_interpreted.py")


def pytest_collection_finish() -> None:
    """Spare the collector what stays until the end: to look through thousands of tests takes it 0.3 s, and
    each measurement of the benchmarks begins with a collection."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let Python take apart at exit what was frozen: Triton's binding reports what is left as leaked."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seed_inputs(request: pytest.FixtureRequest) -> None:
    """Give every test inputs that depend on the seed and on its own name, not on which tests ran before."""
    torch.manual_seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=targets())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Every backend on every device where it is available, and the special ways of using some."""
    target: Target = request.param
    if target.way == "blind":
        monkeypatch.setattr(foreach_cpu, "host_sees", lambda tensor: False)
    if target.way == "columns":
        monkeypatch.setattr(_extension.C, "CAN_READ", False)
    return target
