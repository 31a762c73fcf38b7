"""``python -m gradclip_ext.info``: what is installed, what is available, and why not."""

from __future__ import annotations

import torch
from subprocesses import run_python

import gradclip_ext
from gradclip_ext import backends, info


def test_command_prints_the_report() -> None:
    out = run_python("-m", "gradclip_ext.info", timeout=60)
    assert out.strip(), "nothing was printed"
    for word in (gradclip_ext.__version__, torch.__version__, *backends.ALL):
        assert word in out, f"{word!r} is missing:\n{out}"


def test_every_backend_has_a_line_with_a_verdict() -> None:
    lines = info.report().splitlines()
    for name, backend in backends.ALL.items():
        (line,) = [entry for entry in lines if entry.split()[:2] == [name, "cpu"]]
        reason = backend.why_unavailable(torch.device("cpu"))
        assert ("available" in line and "no:" not in line) if reason is None else reason in line


def test_report_names_the_machine() -> None:
    text = info.report()
    assert "python" in text and "torch" in text and "CUDA" in text
    assert f"{torch.get_num_threads()} CPU threads" in text
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in text
