"""Smooth stand-ins for NDCG on log-ratios: ApproxNDCG and NeuralNDCG."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import core
from ..declare import listwise
from ..lists import Lists
from ..record import GRADES


@listwise.made_for(GRADES)(
    source="arXiv 2410.04346 for its use in alignment",
    status="values and gradients checked against rax and allRank",
    reference=True,
)
def approx_ndcg(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:  # [G]
    """ApproxNDCG: minus the NDCG at ranks counted with a sigmoid.

    l = -1/Z sum_i (2^y_i - 1) / log2(1 + r_i),  r_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / T),
    s = beta logratio,  Z = ideal DCG

    Ordinal preference optimization (arXiv 2410.04346) uses it for alignment. Its slope vanishes
    where scores differ by much more than T.

    Args:
        relevance: `[S]` grades from 0, higher is better, below 128; NaN leaves an answer out.
        temperature: T > 0; 1 as in allRank and rax, 0.1 in TF-Ranking.

    Returns:
        Unreduced loss `[G]` in [-1, 0]; 0 where all are equally relevant or the ideal DCG is 0.
    """
    core.positive("beta", beta)
    core.positive("temperature", temperature)
    lists = Lists(beta * scores, relevance, cu_groups, backend)

    def chance(s: Tensor, s_j: Tensor) -> Tensor:
        return torch.sigmoid((s_j - s) / temperature)

    soft = 0.5 + lists.over_mates(chance, lists.score)  # the item itself gives the other 1/2
    return lists.loss(-lists.sum(lists.shares() * math.log(2.0) / torch.log1p(soft)))


@listwise.made_for(GRADES)(
    source="arXiv 2102.07831",
    status="checked against allRank to 6e-7 (its early stop)",
    reference=True,
)
def neural_ndcg(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
    temperature: float = 1.0,
    sinkhorn_iters: int = 20,
    backend: str = "auto",
) -> Tensor:  # [G]
    """NeuralNDCG: minus the NDCG under a soft permutation that is differentiable in the scores.

    l = -1/Z sum_i 1 / log2(1 + i) sum_j P_ij (2^y_j - 1),  s = beta logratio,
    P = Sinkhorn(softmax_j(((K + 1 - 2i) s_j - sum_k |s_j - s_k|) / temperature))

    Pobrotyn and Bialobrzeski 2021 (arXiv 2102.07831). The authors' code stops its rounds by a test
    over the whole batch; here every list takes the same number, so that its value is its own.

    Args:
        relevance: `[S]` grades from 0, higher is better, below 128; NaN leaves an answer out.
        temperature: Of the soft permutation, > 0.
        sinkhorn_iters: Rounds of column and row scaling, 1 to 1000. A list of K keeps 2 K^2
            numbers per round for the backward.

    Returns:
        Unreduced loss `[G]` in [-1, 0]; 0 where all are equally relevant or the ideal DCG is 0.
        The slope of |s_j - s_k| is 0 at a tie.
    """
    core.positive("beta", beta)
    core.positive("temperature", temperature)
    if isinstance(sinkhorn_iters, bool) or not isinstance(sinkhorn_iters, int):
        raise ValueError(f"sinkhorn_iters must be an int, got {sinkhorn_iters!r}.")
    if not 1 <= sinkhorn_iters <= 1000:
        raise ValueError(f"sinkhorn_iters must be from 1 to 1000, got {sinkhorn_iters}.")
    lists = Lists(beta * scores, relevance, cu_groups, backend)
    apart = lists.over_mates(lambda s, s_j: (s - s_j).abs(), lists.score)
    position = torch.arange(scores.numel(), device=scores.device)
    rank = lists.over_mates(lambda i, j: (j <= i).double(), position)  # rows are ranks 1 to K
    place = lists.spread(lists.size()) + 1.0 - 2.0 * rank

    def row(own: list[Tensor], other: list[Tensor], pair: Tensor) -> Tensor:
        (place, rank, *_), (_, _, s, apart, share) = own, other
        logit = torch.where(pair, (place * s - apart) / temperature, -torch.inf)
        table = torch.softmax(torch.where(pair.any(-1, keepdim=True), logit, 0.0), -1)
        table = torch.where(pair, table, 0.0)
        for _ in range(sinkhorn_iters):
            for dim in (-2, -1):
                total = table.sum(dim, keepdim=True)
                table = table / torch.where(total > 0, total, 1.0)
        return (table * share).sum(-1) / torch.log2(1.0 + rank.clamp(min=1.0)[..., 0])

    columns = (place, rank, lists.score, apart, lists.shares())
    gained = lists.rows(row, *columns, square=2 * sinkhorn_iters)
    return lists.loss(-lists.sum(gained))
