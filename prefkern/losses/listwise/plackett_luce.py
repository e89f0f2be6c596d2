"""DPO for rankings: the Plackett-Luce likelihood of the order of relevance."""

from __future__ import annotations

from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core
from ..declare import listwise
from ..record import GRADES


def gained_labels(*, item_gain: str, **_: object) -> tuple[float, float] | None:
    """Labels of the gains, where they weigh the ranks."""
    return GRADES if item_gain == "exp2" else None


@listwise.made_for(gained_labels)(
    source="arXiv 2305.18290 appendix, arXiv 2402.01878 eq. 7",
    status="checked against rax, allRank and the softmax-DPO authors' code",
    reference=True,
)
def plackett_luce(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.1,
    topk: int | Tensor | None = None,  # [G]
    ties: str = "strict",
    item_gain: str = "none",
    backend: str = "auto",
) -> Tensor:  # [G]
    """Plackett-Luce DPO: negative log-likelihood of drawing the answers in order of relevance.

    l = sum over ranks i <= topk of log sum_{j not before i} exp(s_j) - s_i,  s = beta logratio

    Rafailov et al. 2023 (arXiv 2305.18290), appendix; LiPO's list-mle (arXiv 2402.01878, eq. 7).
    topk = 1 with one best answer is softmax-DPO (arXiv 2406.09215).

    Returns:
        Unreduced loss `[G]`; a list of one gives 0.
    """
    core.positive("beta", beta)
    return list_rank(
        beta * scores,
        relevance,
        cu_groups,
        family="plackett_luce",
        topk=topk,
        ties=ties,
        item_gain=item_gain,
        backend=backend,
    )
