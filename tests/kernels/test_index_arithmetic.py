"""Index arithmetic of the core (csrc/core/tensor_list.h): chunks, launches, vector splits, shared memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from cases import REAL_DTYPES, SEED, name_of

testing = pytest.importorskip(
    "gradclip_ext._testing", reason="gradclip_ext._testing is not built", exc_type=ImportError
)


@pytest.mark.parametrize("check", ["check_cuts", "check_splits", "check_aliasing"])
def test_a_million_random_lists(check: str) -> None:
    """Compared in C++ with walking along the list; the message of a failure holds the list's seed."""
    getattr(testing, check)(SEED, 1_000_000)


def naive_chunks(numels: list[int], sizes: list[int], chunk_bytes: int) -> Iterator[tuple[int, int, int]]:
    for tensor, (numel, size) in enumerate(zip(numels, sizes)):
        chunk_numel = chunk_bytes // size
        for offset in range(0, numel, chunk_numel):
            yield tensor, offset, min(chunk_numel, numel - offset)


def test_chunks() -> None:
    rng = random.Random(SEED)
    for _ in range(300):
        dtypes = [rng.choice(REAL_DTYPES) for _ in range(rng.randrange(9))]
        chunk_bytes = 8 * 2 ** rng.randrange(5)
        numels = [max(0, chunk_bytes // d.itemsize * rng.randrange(4) + rng.randrange(-1, 2)) for d in dtypes]
        found = testing.chunks(numels, [name_of(d) for d in dtypes], chunk_bytes)
        assert found == list(naive_chunks(numels, [d.itemsize for d in dtypes], chunk_bytes)), f"seed {SEED}"


def test_chunks_beyond_32_bits() -> None:
    numels = [2**31 + 1, 0, 2**40, 3]
    found = testing.chunks(numels, ["float16"] * 4, 2**32)
    assert found == list(naive_chunks(numels, [2] * 4, 2**32))
    assert found[1] == (0, 2**31, 1) and found[-1] == (3, 0, 3) and len(found) == 2 + 512 + 1


def test_launches_cover_the_list_once() -> None:
    rng = random.Random(SEED)
    numels = [rng.randrange(100) for _ in range(5000)]
    found = testing.launches(numels, ["float32"] * 5000, 64)
    tensors = chunks = 0
    for first_tensor, count, first_chunk, chunk_count in found:
        assert (first_tensor, first_chunk) == (tensors, chunks)
        tensors += count
        chunks += chunk_count
    assert tensors == 5000 and chunks == sum(-(-n // 16) for n in numels)
    assert 2300 <= max(count for _, count, _, _ in found) <= 2340


@pytest.mark.parametrize(
    ("addresses", "found"),
    [
        ([0, 40, 80], "none"),
        ([80, 40, 0], "none"),
        ([40, 80, 0], "none"),
        ([80, 0, 40, 0], "duplicates"),
        ([80, 0, 76, 40], "overlap"),
        ([80, 0, 40, 0, 4], "overlap"),
    ],
)
def test_aliasing(addresses: list[int], found: str) -> None:
    assert testing.aliasing(addresses, [10] * len(addresses), "float32") == found
    assert testing.aliasing([*addresses, 44], [*[10] * len(addresses), 0], "float32") == found
