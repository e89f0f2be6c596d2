"""Problem sizes, in one place. D hidden size, V vocabulary."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """A batch of preference pairs: 2 * pairs answers of `tokens` tokens each."""

    pairs: int
    tokens: int
    D: int
    V: int

    @property
    def N(self) -> int:
        return 2 * self.pairs * self.tokens


# The shape at which the peers were surveyed: logits are 250 MiB in fp32, the head 62.5 MiB.
BASE = Shape(pairs=4, tokens=256, D=512, V=32000)
# Same N in one pair: whoever chunks by pairs holds everything at once.
LONG_PAIR = Shape(pairs=1, tokens=1024, D=512, V=32000)
# Llama 3's vocabulary: V / D = 125, where chunk sizes derived from N * D / V fall to a few rows.
LARGE_VOCABULARY = Shape(pairs=2, tokens=128, D=1024, V=128256)
# `--quick`: the same proportions at 1/32 of the work.
QUICK = Shape(pairs=4, tokens=64, D=256, V=8000)
QUICK_LONG = Shape(pairs=1, tokens=256, D=256, V=8000)
# Smoke tests: ragged against every tile size.
TINY = Shape(pairs=2, tokens=9, D=20, V=131)
TINY_LONG = Shape(pairs=1, tokens=18, D=20, V=131)


def reduced(shape: Shape, size: str) -> Shape:
    """The stand-in for `shape` at size "full", "quick" or "tiny"."""
    if size == "full":
        return shape
    long = shape.pairs == 1
    if size == "quick":
        return QUICK_LONG if long else QUICK
    return TINY_LONG if long else TINY
