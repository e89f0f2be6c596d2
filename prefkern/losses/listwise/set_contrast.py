"""Set contrast: answers above the mean reward against all answers."""

from __future__ import annotations

from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core
from ..record import Loss


def set_contrast(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
    alpha: float = 1.0,
    backend: str = "auto",
) -> Tensor:  # [G]
    """Weighted contrast of the answers above the mean reward with the whole list.

    l = log sum_i exp(x_i) - log sum_{y_i > mean y} exp(x_i),
    x_i = s_i + alpha |y_i - mean y|,  s = beta logratio

    After summaries of SWEPO (arXiv 2412.04628), which agree on the split and on the weight of the
    answers above the mean; the weight of the others and the default alpha are assumptions.

    Args:
        scores: `[S]` log-ratio of each response.
        labels: `[S]` reward, higher is better; NaN removes a response. A reward equal to the mean
            counts as low.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.05.
        alpha: Weight per unit of deviation from the mean, default 1; 0 weighs all alike.
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; 0 where no label differs.

    Raises:
        ValueError: beta <= 0, shapes that do not fit.
    """
    core.positive("beta", beta)
    return list_rank(
        beta * scores, labels, cu_groups, family="set_contrast", deviation=alpha, backend=backend
    )


SET_CONTRAST = Loss(
    set_contrast,
    "set_contrast",
    "listwise",
    needs_reference=True,
    status="provisional: from summaries; weight of the low side and alpha not confirmed",
    source="arXiv 2412.04628",
    rewards=core.logratio_rewards,
)
