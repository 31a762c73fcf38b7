"""Types of command line options that both programs have."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Return ``text`` as an integer of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number
