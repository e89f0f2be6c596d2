"""How batches are dealt out to the processes."""

from __future__ import annotations

from collections.abc import Iterator


def deal(chunk: list[list[int]], rank: int, world: int) -> Iterator[tuple[list[int], bool]]:
    """This rank's batches of `chunk`; (its first batch, False) where the rank has one too few."""
    for start in range(0, len(chunk), world):
        has = start + rank < len(chunk)
        yield (chunk[start + rank], True) if has else (chunk[0], False)
