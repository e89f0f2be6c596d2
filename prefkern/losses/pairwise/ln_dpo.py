"""Length-normalised DPO."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


def ln_dpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 5.0,
    label_smoothing: float = 0.0,
) -> Tensor:  # [P]
    """Length-normalised DPO: logistic loss of the margin of log-ratios per token.

    l = (1 - eps) softplus(-m) + eps softplus(m),
    m = beta (mean_logratio(chosen) - mean_logratio(rejected))

    arXiv 2407.15229, also in Tulu 3; TRL's sigmoid_norm.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`,
            `length`.
        beta: Scale of the margin per token, > 0, default 5; useful values are 1 to 10.
        label_smoothing: Probability eps in [0, 0.5] that a label is wrong, default 0.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, label_smoothing outside [0, 0.5], shapes that differ.
    """
    core.positive("beta", beta)
    margin = beta * core.difference(chosen.mean_logratio, rejected.mean_logratio)
    return links.smoothed_logistic(margin, label_smoothing)


LN_DPO = Loss(
    ln_dpo,
    "ln_dpo",
    "pairwise",
    needs_reference=True,
    status="checked against TRL; paper formula second-hand",
    source="arXiv 2407.15229",
    rewards=core.logratio_rewards,
)
