"""Noise-contrastive alignment: InfoNCA and NCA on lists with rewards."""

from __future__ import annotations

from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core
from ..record import Loss


def infonca(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.01,
    alpha: float = 1e-4,
    backend: str = "auto",
) -> Tensor:  # [G]
    """InfoNCA: cross-entropy of the scores' softmax with the rewards' softmax.

    l = -sum_i q_i (s_i - log sum_j exp s_j),  q = softmax(y / alpha),  s = beta logratio

    Chen et al. 2024 (arXiv 2402.05369). A list of two with alpha -> 0 is DPO.

    Args:
        scores: `[S]` log-ratio of each response.
        labels: `[S]` reward, higher is better; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.01.
        alpha: Temperature of the rewards, > 0, default 1e-4 (almost one-hot).
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; a list of one gives 0.

    Raises:
        ValueError: beta or alpha <= 0, shapes that do not fit.
    """
    core.positive("beta", beta)
    return list_rank(
        beta * scores, labels, cu_groups, family="softmax", target="softmax", alpha=alpha,
        backend=backend,
    )  # fmt: skip


def nca(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.01,
    alpha: float = 1e-4,
    backend: str = "auto",
) -> Tensor:  # [G]
    """NCA: tells responses from noise one by one, so that absolute likelihood counts.

    l = -sum_i q_i log sigmoid(s_i) - 1/K sum_i log sigmoid(-s_i),
    q = softmax(y / alpha),  s = beta logratio

    Chen et al. 2024 (arXiv 2402.05369). `nca_pair` is the list of two with one-hot q.

    Args:
        scores: `[S]` log-ratio of each response.
        labels: `[S]` reward, higher is better; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.01.
        alpha: Temperature of the rewards, > 0, default 1e-4 (almost one-hot).
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; a list of one counts.

    Raises:
        ValueError: beta or alpha <= 0, shapes that do not fit.
    """
    core.positive("beta", beta)
    return list_rank(beta * scores, labels, cu_groups, family="nca", alpha=alpha, backend=backend)


INFONCA, NCA = (
    Loss(
        fn,
        fn.__name__,
        "listwise",
        needs_reference=True,
        status="checked against the authors' code",
        source="arXiv 2402.05369",
        rewards=core.logratio_rewards,
    )
    for fn in (infonca, nca)
)
