"""Smooth stand-ins for NDCG on log-ratios: ApproxNDCG and NeuralNDCG."""

from __future__ import annotations

from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core
from ..record import Loss


def approx_ndcg(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
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
        scores: `[S]` log-ratio of each response.
        labels: `[S]` relevance, higher is better, below 128; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.05.
        temperature: T > 0, default 1 (allRank, rax); 0.1 in TF-Ranking.
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]` in [-1, 0]; 0 where no label differs or the ideal DCG is 0.

    Raises:
        ValueError: beta or temperature <= 0, shapes that do not fit.
    """
    core.positive("beta", beta)
    return list_rank(
        beta * scores, labels, cu_groups, family="approx_ndcg", temperature=temperature,
        backend=backend,
    )  # fmt: skip


def neural_ndcg(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
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
        scores: `[S]` log-ratio of each response.
        labels: `[S]` relevance, higher is better, below 128; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.05.
        temperature: Of the soft permutation, > 0, default 1.
        sinkhorn_iters: Rounds of column and row scaling, >= 1, default 20.
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]` in [-1, 0]; 0 where no label differs or the ideal DCG is 0. The slope
        of |s_j - s_k| is 0 at a tie.

    Raises:
        ValueError: beta or temperature <= 0, sinkhorn_iters < 1, shapes that do not fit.
    """
    core.positive("beta", beta)
    return list_rank(
        beta * scores, labels, cu_groups, family="neural_ndcg", temperature=temperature,
        sinkhorn_iters=sinkhorn_iters, backend=backend,
    )  # fmt: skip


APPROX_NDCG = Loss(
    approx_ndcg,
    "approx_ndcg",
    "listwise",
    needs_reference=True,
    status="values and gradients checked against rax and allRank",
    source="arXiv 2410.04346 for its use in alignment",
    rewards=core.logratio_rewards,
)
NEURAL_NDCG = Loss(
    neural_ndcg,
    "neural_ndcg",
    "listwise",
    needs_reference=True,
    status="checked against allRank to 6e-7 (its early stop)",
    source="arXiv 2102.07831",
    rewards=core.logratio_rewards,
)
