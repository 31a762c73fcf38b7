"""The processes that the tests of this folder share."""

from ranks import ranks  # noqa: F401
