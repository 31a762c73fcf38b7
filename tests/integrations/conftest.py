"""What the tests of this folder share: processes, and the calls that were counted."""

import pytest
from ranks import ranks  # noqa: F401

from gradclip_ext import calls


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], int]:
    """The calls of this package during one test."""
    found: dict[tuple[str, str], int] = {}
    monkeypatch.setattr(calls, "_counts", found)
    return found
