"""Plackett-Luce likelihoods of the first ranks only: S-DPO (one winner) and a top-K form."""

from __future__ import annotations

from torch import Tensor

from ..declare import formula, listwise
from .plackett_luce import plackett_luce


@listwise(
    source="arXiv 2406.09215",
    status="checked against the authors' code in its finite range",
    reference=True,
)
def sdpo(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.1,
    backend: str = "auto",
) -> Tensor:  # [G]
    """S-DPO: one chosen answer against several rejected ones at once.

    l = -log sigmoid(-log sum_{j != w} exp(s_j - s_w)) = log sum_j exp(s_j) - s_w,
    s = beta logratio

    Chen et al. 2024 (arXiv 2406.09215), as in the authors' code with a shifted exponential. The
    winner w is the first answer of highest relevance.

    Args:
        beta: Strength of the pull to the reference, > 0; 1 in the authors' script.

    Returns:
        Unreduced loss `[G]`; a list of one gives 0.
    """
    return formula(plackett_luce)(
        scores, relevance, cu_groups, beta=beta, topk=1, ties="stable", backend=backend
    )


@listwise(
    source="arXiv 2506.00441",
    status="provisional: top-K likelihood assumed from a summary of the paper",
    reference=True,
)
def kpo(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
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
        topk: K_g, int or `[G]` integers >= 1; larger than the list means all.

    Returns:
        Unreduced loss `[G]`; a list of one gives 0.
    """
    return formula(plackett_luce)(
        scores, relevance, cu_groups, beta=beta, topk=topk, ties=ties, backend=backend
    )
