"""Ragged groups of scored items in plain torch, for the ranking losses that list_rank lacks.

Arithmetic is float64 and autograd's own. Sums over all pairs of a group's items go through tables
[R, K] of R items against K items. Up to 512 items in the batch, and under torch.compile, they are
one table [S, S], which asks the device nothing, compiles whole and can be captured. Larger batches
are cut into blocks of at most CELLS cells (reading the sizes of the groups: one synchronisation on
a GPU), long lists into blocks of rows; where that makes several, their tables are formed again in
the backward, so memory is O(S + CELLS) numbers.

Shapes: S items, G groups.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..backends.list_blocks import blocks
from ..ops import ragged
from ..ops.list_rank import check_lists, check_values
from ..ops.segment_sum import segment_sum

WHOLE = 1 << 18  # cells of the table of a whole batch: 2 MiB
CELLS = 1 << 20  # cells of a block's table: 8 MiB

Columns = list[Tensor]
Row = Callable[[Columns, Columns, Tensor], Tensor]


class Lists:
    """The groups of one call. `score` and `relevance` are [S] float64, 0 where an item is masked.

    A group with a score or relevance that is not finite has score 0 here and a loss of NaN.
    """

    def __init__(
        self,
        scores: Tensor,  # [S]
        relevance: Tensor,  # [S], NaN where masked
        cu_groups: Tensor,  # [G+1]
        backend: str = "auto",
    ) -> None:
        self.cu_groups = check_lists(scores, relevance, cu_groups)
        if relevance.device.type == "cpu" and not torch.compiler.is_compiling():
            check_values(relevance, self.cu_groups)
        self.backend, self.dtype, self.relevance_dtype = backend, scores.dtype, relevance.dtype
        groups = self.cu_groups.numel() - 1
        if groups == 0 and scores.numel():
            raise ValueError(f"{scores.numel()} items need a group, got cu_groups without any.")
        # On a GPU boundaries are not read: an item outside them belongs nowhere, like a masked one.
        item = torch.arange(scores.numel(), device=scores.device)
        held = (item >= self.cu_groups[0]) & (item < self.cu_groups[-1])
        self.owner = ragged.owner(self.cu_groups, scores.numel()).clamp(max=max(groups - 1, 0))
        self.valid = held & ~relevance.isnan()
        self.relevance = torch.where(self.valid, relevance.double(), 0.0)
        self.given = torch.where(self.valid, scores.double(), 0.0)
        broken = ~(self.given.isfinite() & self.relevance.isfinite())
        self.broken = self.spread(self.sum(broken.double()) > 0)
        self.score = torch.where(self.broken, 0.0, self.given)
        self.relevance = torch.where(self.broken, 0.0, self.relevance)

    def sum(self, x: Tensor) -> Tensor:  # [S] -> [G]
        """Sum over the valid items of each group."""
        return segment_sum(torch.where(self.valid, x, 0.0), self.cu_groups, backend=self.backend)

    def spread(self, x: Tensor) -> Tensor:  # [G] -> [S]
        """The number of each item's group."""
        return x[self.owner]

    def size(self) -> Tensor:  # [G]
        """Valid items of each group."""
        return self.sum(torch.ones_like(self.relevance))

    def lower(self) -> Tensor:  # [S]
        """Number of items of its group that are less relevant, for each item."""
        return self.over_mates(lambda y, y_j: (y > y_j).double(), self.relevance)

    def pairs(self) -> Tensor:  # [G]
        """Strict pairs of each group: y_i > y_j."""
        return self.sum(self.lower())

    def most(self, x: Tensor) -> Tensor:  # [S] -> [G]
        """The greatest valid number of each group, a constant; -inf where there is none."""
        lowest = x.new_full((self.cu_groups.numel() - 1,), -torch.inf)
        kept = torch.where(self.valid, x.detach(), -torch.inf)
        return lowest.scatter_reduce(0, self.owner, kept, "amax")

    def log_sum_exp(self, x: Tensor, member: Tensor) -> Tensor:  # [S], [S] bool -> [G]
        """log sum exp over the valid members of each group; a group without any gives 0."""
        top = self.most(torch.where(member, x, -torch.inf))
        top = torch.where(top.isfinite(), top, 0.0)
        # Selected before exp as well: what others overflow to would be NaN in the backward.
        below = torch.where(member, x - self.spread(top), 0.0)
        total = self.sum(torch.where(member, torch.exp(below), 0.0))
        return torch.log(torch.where(total > 0, total, 1.0)) + top

    def differ(self) -> Tensor:  # [S] bool
        """Whether the relevances of an item's group are not all equal."""
        return self.spread(self.most(self.relevance) > -self.most(-self.relevance))

    def rank(self) -> Tensor:  # [S]
        """1-based rank by relevance, descending, equal ones by position; 0 where masked."""
        place = torch.arange(self.valid.numel(), device=self.valid.device)

        def ahead(y: Tensor, i: Tensor, y_j: Tensor, j: Tensor) -> Tensor:
            return ((y_j > y) | ((y_j == y) & (j <= i))).double()

        return self.over_mates(ahead, self.relevance, place)

    def shares(self) -> Tensor:  # [S]
        """Gains 2^y - 1 over the ideal DCG; 0 where that is 0 or all are equally relevant. NaN in a
        group with a negative relevance, whose negative gains would turn the order around.

        Raises:
            ValueError: a negative relevance on the CPU.
        """
        below = self.relevance < 0
        if below.device.type == "cpu" and not torch.compiler.is_compiling() and bool(below.any()):
            raise ValueError(
                f"relevance must be >= 0, got {self.relevance.min().item()}: a gain 2^y - 1 below "
                "0 turns the order around; shift the numbers, or give ranks."
            )
        gain = torch.expm1(self.relevance * math.log(2.0))
        ideal = self.spread(self.sum(gain / torch.log2(1.0 + self.rank())))
        real = self.differ() & (ideal != 0)
        share = torch.where(real, gain / torch.where(real, ideal, 1.0), 0.0)
        return torch.where(self.spread(self.sum(below.double())) > 0, torch.nan, share)

    def over_mates(
        self, fn: Callable[..., Tensor], *columns: Tensor, reduce: str = "sum"
    ) -> Tensor:  # [S]
        """fn(own columns..., another's columns...) summed over the valid items of the own group,
        the own item among them; or "logsumexp", where a row without any must not be read."""

        def row(own: Columns, other: Columns, pair: Tensor) -> Tensor:
            value = fn(*own, *other)
            if reduce == "sum":
                return torch.where(pair, value, 0.0).sum(-1)
            return torch.logsumexp(torch.where(pair, value, -torch.inf), -1)

        return self.rows(row, *columns)

    def rows(self, row: Row, *columns: Tensor, square: int = 0) -> Tensor:  # [S]
        """row(own [..., R, 1] each, other [..., 1, K] each, pair [..., R, K]) for every item.

        `pair` is true where both are valid items of one group. With `square` a row may read the
        other rows of its group's table, of which it keeps that many copies.
        """
        n, copies = self.valid.numel(), max(square, 1)
        if torch.compiler.is_compiling() or n * n * copies <= WHOLE:
            pair = (self.owner[:, None] == self.owner) & self.valid[:, None] & self.valid
            return row([c[:, None] for c in columns], [c[None] for c in columns], pair)

        def block(mine: Tensor, held: Tensor, items: Tensor, inside: Tensor, *columns: Tensor):
            own, other = held & self.valid[mine], inside & self.valid[items]
            each = row(
                [c[mine][..., None] for c in columns],
                [c[items][..., None, :] for c in columns],
                own[..., None] & other[..., None, :],
            )
            return torch.where(held, each, 0.0)

        pieces = list(self._pieces(CELLS // copies, square > 0))
        if not pieces:
            return self.score.new_zeros(n)
        if len(pieces) == 1:
            found = [block(*pieces[0], *columns)]
        else:
            again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            found = [again(block, *piece, *columns) for piece in pieces]
        index = torch.cat([mine.reshape(-1) for mine, *_ in pieces])
        values = torch.cat([x.reshape(-1) for x in found])
        return values.new_zeros(n).index_put((index,), values, accumulate=True)

    def _pieces(self, cells: int, whole: bool) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(rows' items, inside, columns' items, inside) of blocks; long lists in blocks of rows."""
        for _, items, inside in blocks(self.cu_groups, cells):
            k = items.shape[1]
            step = max(cells // k, 1) if len(items) == 1 and not whole else k
            for first in range(0, k, step):
                cut = slice(first, first + step)
                yield items[:, cut], inside[:, cut], items, inside

    def loss(self, found: Tensor) -> Tensor:  # [G] -> [G]
        """The losses in the scores' dtype, NaN with all slopes of its items for a broken group."""
        hurt = self.given * torch.where(self.broken, torch.nan, 0.0)
        return (found + self.sum(hurt)).to(self.dtype)
