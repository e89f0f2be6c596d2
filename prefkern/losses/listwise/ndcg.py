"""Smooth stand-ins for NDCG on log-ratios: ApproxNDCG and NeuralNDCG."""

from __future__ import annotations

from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core
from ..declare import listwise


@listwise(
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
        relevance: `[S]` numbers, higher is better, below 128; NaN leaves an answer out.
        temperature: T > 0; 1 as in allRank and rax, 0.1 in TF-Ranking.

    Returns:
        Unreduced loss `[G]` in [-1, 0]; 0 where all are equally relevant or the ideal DCG is 0.
    """
    core.positive("beta", beta)
    return list_rank(
        beta * scores, relevance, cu_groups, family="approx_ndcg", temperature=temperature,
        backend=backend,
    )  # fmt: skip


@listwise(
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
        relevance: `[S]` numbers, higher is better, below 128; NaN leaves an answer out.
        temperature: Of the soft permutation, > 0.
        sinkhorn_iters: Rounds of column and row scaling, >= 1.

    Returns:
        Unreduced loss `[G]` in [-1, 0]; 0 where all are equally relevant or the ideal DCG is 0.
        The slope of |s_j - s_k| is 0 at a tie.
    """
    core.positive("beta", beta)
    return list_rank(
        beta * scores, relevance, cu_groups, family="neural_ndcg", temperature=temperature,
        sinkhorn_iters=sinkhorn_iters, backend=backend,
    )  # fmt: skip
