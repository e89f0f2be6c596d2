"""DPO for rankings: the Plackett-Luce likelihood of the label order."""

from __future__ import annotations

from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core
from ..record import Loss


def plackett_luce(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.1,
    topk: int | Tensor | None = None,  # [G]
    ties: str = "strict",
    item_gain: str = "none",
    backend: str = "auto",
) -> Tensor:  # [G]
    """Plackett-Luce DPO: negative log-likelihood of drawing the responses in label order.

    l = sum over ranks i <= topk of log sum_{j not before i} exp(s_j) - s_i,  s = beta logratio

    Rafailov et al. 2023 (arXiv 2305.18290), appendix; LiPO's list-mle (arXiv 2402.01878, eq. 7).
    topk = 1 with one best response is softmax-DPO (arXiv 2406.09215).

    Args:
        scores: `[S]` log-ratio of each response.
        labels: `[S]` relevance, higher is better; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.1.
        topk: Number of ranks that count, int or `[G]` integers >= 1, default None (all).
        ties: Equal labels: "strict" never compares tied responses (all equal gives 0), "breslow"
            lets each compete with all it is tied with, "stable" trains the stored order; default
            "strict". With topk, strict and breslow keep a tied block whole.
        item_gain: "none", or "exp2" to weigh each rank by 2^y - 1; default "none".
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; a list of one gives 0.

    Raises:
        ValueError: beta <= 0, an unknown option, topk < 1, shapes that do not fit.
    """
    core.positive("beta", beta)
    return list_rank(
        beta * scores,
        labels,
        cu_groups,
        family="plackett_luce",
        topk=topk,
        ties=ties,
        item_gain=item_gain,
        backend=backend,
    )


PLACKETT_LUCE = Loss(
    plackett_luce,
    "plackett_luce",
    "listwise",
    needs_reference=True,
    status="checked against rax, allRank and the softmax-DPO authors' code",
    source="arXiv 2305.18290 appendix, arXiv 2402.01878 eq. 7",
    rewards=core.logratio_rewards,
)
