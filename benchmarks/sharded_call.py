"""What a head op on rows of a vocabulary costs a rank: collectives, products, memory.

Shapes: R ranks, n tokens of a rank (all scored), M rows that a rank computes, V vocabulary, D
hidden size, r rank of low-rank terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from prefkern.backends import memory, tables
from prefkern.backends.contract import FOLDED_ROUNDED, written
from prefkern.backends.plan import Plan, read_plan, write_plan
from prefkern.ops.sharded import reads
from prefkern.stats import ONE_MODEL_STATS, TWO_MODEL_STATS, parse_stats

NUMBER = 8  # bytes of a sum, a target, a count


class Sent(NamedTuple):
    """One collective: what a rank hands over."""

    collective: str
    size: int  # bytes
    why: str


@dataclass(frozen=True)
class Call:
    """One op of a rank: `tokens` as in prefkern.Shard."""

    stats: tuple[str, ...]
    n: int
    V: int
    D: int
    ranks: int
    tokens: str = "same"
    ref_D: int = 0  # 0: no reference
    low_rank: int = 0
    itemsize: int = 2  # of the compute dtype
    trained: bool = True  # the head; hidden states always
    tail: float = 0.0
    folds_wide: bool = False  # a backend's: products of 16-bit operands folded unrounded

    @property
    def rows(self) -> int:
        return self.n if self.tokens == "same" else self.n * self.ranks

    @property
    def vocabulary(self) -> int:
        """Rows of the largest shard, as a DTensor cuts them."""
        return -(-self.V // self.ranks)

    @property
    def fold_itemsize(self) -> int:
        return 8 if self.itemsize == 8 else 4

    @property
    def plan(self) -> Plan:
        tensors = ["hidden", "weight", *(["low_in", "low_out"] if self.low_rank else [])]
        tensors += ["ref_hidden", "ref_weight"] if self.ref_D else []
        parsed = parse_stats(self.stats, allowed=ONE_MODEL_STATS + TWO_MODEL_STATS)
        short = self.itemsize == 2
        text = write_plan(
            parsed, frozenset(), (*tensors, "targets"), short=short,
            frozen=not self.trained and self.tail == 0.0, tail=self.tail,
        )  # fmt: skip
        return read_plan(text)

    @property
    def sums(self) -> int:
        """Numbers of a row that the ranks exchange."""
        plan = self.plan
        names = {s.name for s in plan.stats}
        short = self.itemsize == 2
        rounded = short and not plan.exact and not plan.frozen
        rounded &= self.folds_wide or not names <= FOLDED_ROUNDED
        return len(written(plan, rounded)) + sum(reads(plan, name) for name in tables.AT)

    def _tokens(self) -> list[Sent]:
        """Where ranks bring their own tokens, of all of them, in both directions."""
        if self.tokens == "same":
            return []
        found = [Sent("all_gather", NUMBER, "number of tokens")]
        for width, why in (
            (self.D, "hidden states"), (self.low_rank, "left factors"),
            (self.ref_D, "reference's hidden states"),
        ):  # fmt: skip
            if width:
                found.append(Sent("all_gather", self.n * width * self.itemsize, why))
        return [*found, Sent("all_gather", self.n * NUMBER, "targets")]

    def forward(self) -> list[Sent]:
        plan, rows = self.plan, self.rows
        found = [*self._tokens(), Sent("all_gather", self.sums * rows * NUMBER, "sums")]
        if plan.has("bkl"):
            k = min(int(plan.param("bkl")), self.V)
            found.append(Sent("all_gather", 2 * k * rows * NUMBER, "largest reference logits"))
        if plan.second:
            size = len(tables.SECOND) * rows * NUMBER
            found.append(Sent("all_reduce", size, "sums of the second sweep"))
        if plan.tail:
            units = plan.tail_models * -(-self.vocabulary // tables.CHUNK) * rows
            found.append(Sent("all_gather", units * self.fold_itemsize, "masses of chunks"))
            found.append(Sent("all_reduce", rows * self.fold_itemsize, "share computed"))
        return found

    def backward(self) -> list[Sent]:
        found = self._tokens()
        width = self.D + self.low_rank
        if self.tokens == "same":
            return [Sent("all_reduce", self.rows * width * self.itemsize, "gradient of hidden")]
        size = len(self.plan.stats) * self.n * self.fold_itemsize
        found.append(Sent("all_gather", size, "gradients of statistics"))
        size = self.rows * width * self.itemsize
        return [*found, Sent("reduce_scatter", size, "gradient of hidden")]

    def products(self) -> dict[str, float]:
        """FLOP of a rank with every logit kept."""
        one = 2.0 * self.rows * self.D * self.vocabulary
        reference = 2.0 * self.rows * self.ref_D * self.vocabulary
        found = {"forward": one + reference, "d_hidden": one}
        return found | ({"d_weight": one} if self.trained else {})

    def again(self, budget: int) -> float:
        """FLOP of what is not kept and computed again by the backward."""
        if self.plan.frozen:
            return 0.0
        widths = [self.D, self.ref_D][: 1 + self.plan.reads_reference]
        share = 1.0 - self.kept(budget) / self._logits()
        return share * sum(2.0 * self.rows * d * self.vocabulary for d in widths)

    def _logits(self) -> int:
        """Bytes of the logits that the backward reads."""
        size = 4 if self.plan.exact else self.itemsize
        return self.rows * self.vocabulary * size * (1 + self.plan.reads_reference)

    def kept(self, budget: int) -> int:
        return 0 if self.plan.frozen else min(budget, self._logits())

    def memory(self, device: int) -> dict[str, int]:
        """Bytes of a rank on a GPU of that memory, by item; the rows of the head among them."""
        row = memory.row("cuda", device)
        head, rows = self.vocabulary * self.D, self.rows
        found = {
            "head rows": (head + self.vocabulary * self.ref_D) * self.itemsize,
            "gradient of hidden": rows * (self.D + self.low_rank) * self.itemsize,
            "logits kept": self.kept(row.budget),
            "tiles": row.tiles,
            "sums": rows * NUMBER * (self.sums * (self.ranks + 1) + self.plan.saved_rows),
        }
        if self.tokens != "same":
            widths = self.D + self.ref_D + self.low_rank
            found["gathered hidden states"] = rows * widths * self.itemsize
        if self.plan.frozen:
            found["head rows per token"] = len(self.plan.factors) * rows * self.D * 4
        if self.trained:  # accumulated in fp32, returned in the weight's dtype
            found["gradient of the head"] = head * (4 + (self.itemsize if self.itemsize < 4 else 0))
        return found
