"""Plackett-Luce likelihoods of the first ranks only: S-DPO (one winner) and a top-K form."""

from __future__ import annotations

from torch import Tensor

from .. import core
from ..record import Loss
from .plackett_luce import plackett_luce


def sdpo(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.1,
    backend: str = "auto",
) -> Tensor:  # [G]
    """S-DPO: one chosen response against several rejected ones at once.

    l = -log sigmoid(-log sum_{j != w} exp(s_j - s_w)) = log sum_j exp(s_j) - s_w,
    s = beta logratio

    Chen et al. 2024 (arXiv 2406.09215), as in the authors' code with a shifted exponential. The
    winner w is the first response of highest label.

    Args:
        scores: `[S]` log-ratio of each response.
        labels: `[S]` relevance, higher is better; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.1 (1 in the authors' script).
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; a list of one gives 0.

    Raises:
        ValueError: beta <= 0, shapes that do not fit.
    """
    return plackett_luce(
        scores, labels, cu_groups, beta=beta, topk=1, ties="stable", backend=backend
    )


def kpo(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    topk: int | Tensor,  # [G]
    beta: float = 0.1,
    ties: str = "stable",
    backend: str = "auto",
) -> Tensor:  # [G]
    """Top-K Plackett-Luce likelihood with a K of its own for every list.

    l = sum over ranks i <= K_g of log sum_{j not before i} exp(s_j) - s_i,  s = beta logratio

    After K-order ranking preference optimization (arXiv 2506.00441), of which only a summary was
    available: that its loss is this plain product is an assumption, and its small-K-first
    curriculum is the caller's.

    Args:
        scores: `[S]` log-ratio of each response.
        labels: `[S]` relevance, higher is better; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        topk: K_g, int or `[G]` integers >= 1; larger than the list means all.
        beta: Strength of the pull to the reference, > 0, default 0.1.
        ties: "stable", "breslow" or "strict" as in `plackett_luce`, default "stable".
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; a list of one gives 0.

    Raises:
        ValueError: beta <= 0, topk < 1, an unknown option, shapes that do not fit.
    """
    return plackett_luce(
        scores, labels, cu_groups, beta=beta, topk=topk, ties=ties, backend=backend
    )


SDPO = Loss(
    sdpo,
    "sdpo",
    "listwise",
    needs_reference=True,
    status="checked against the authors' code in its finite range",
    source="arXiv 2406.09215",
    rewards=core.logratio_rewards,
)
KPO = Loss(
    kpo,
    "kpo",
    "listwise",
    needs_reference=True,
    extra=("topk",),
    status="provisional: top-K likelihood assumed from a summary of the paper",
    source="arXiv 2506.00441",
    rewards=core.logratio_rewards,
)
