"""R-DPO: DPO with a length penalty in the margin."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


def r_dpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.1,
    alpha: float = 0.05,
) -> Tensor:  # [P]
    """R-DPO: the longer answer needs less of a margin to be chosen and more to be preferred.

    l = softplus(-m),
    m = beta (logratio(chosen) - logratio(rejected)) + alpha (length(chosen) - length(rejected))

    Park et al. 2024 (arXiv 2403.19159); the sign follows from the length-penalised objective.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`,
            `length`.
        beta: Strength of the pull to the reference, > 0, default 0.1.
        alpha: Penalty per token, default 0.05.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, shapes that differ.
    """
    core.positive("beta", beta)
    gap = core.logratio_gap(chosen, rejected)
    longer = (chosen.require("length") - rejected.require("length")).to(gap.dtype)
    return links.logistic(beta * gap + alpha * longer)


R_DPO = Loss(
    r_dpo,
    "r_dpo",
    "pairwise",
    needs_reference=True,
    status="sign second-hand, from a third-party trainer and the objective",
    source="arXiv 2403.19159",
    rewards=core.logratio_rewards,
)
