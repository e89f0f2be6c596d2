"""R-DPO: DPO with a length penalty in the margin."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2403.19159",
    status="sign second-hand, from a third-party trainer and the objective",
    reference=True,
    reads=("logp", "length"),
)
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
        alpha: Penalty per token.
    """
    core.positive("beta", beta)
    gap = core.logratio_gap(chosen, rejected)
    longer = (chosen.require("length") - rejected.require("length")).to(gap.dtype)
    return links.logistic(beta * gap + alpha * longer)
