"""DPO with a second, moving reference (after online fast-slow chasing)."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2406.05534",
    status="provisional: composition after a description; the paper's regulariser was not read",
    reference=True,
)
def dpo_second_reference(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    slow_chosen_logps: Tensor,  # [P]
    slow_rejected_logps: Tensor,  # [P]
    beta: float = 0.1,
    alpha: float = 0.5,
) -> Tensor:  # [P]
    """DPO plus a logistic term that drives the policy's gap beyond that of a slower model.

    l = softplus(-beta m) + alpha softplus(-beta (d - d_slow)),
    m = logratio(chosen) - logratio(rejected),  d = logp(chosen) - logp(rejected)

    A composition of this package after the description of OFS-DPO (arXiv 2406.05534), whose exact
    regulariser was not read. The slow model itself trains with plain `dpo`.

    Args:
        slow_chosen_logps: `[P]` log-probability of the chosen answer under the slow model,
            constant.
        slow_rejected_logps: `[P]` the same for the rejected answer.
        alpha: Weight of the second term, >= 0; 0 is DPO.
    """
    core.positive("beta", beta)
    core.not_negative("alpha", alpha)
    margin = core.logratio_gap(chosen, rejected)
    gap = core.difference(chosen.require("logp"), rejected.require("logp"))
    slow = core.data("slow_chosen_logps", slow_chosen_logps, gap) - core.data(
        "slow_rejected_logps", slow_rejected_logps, gap
    )
    return links.logistic(beta * margin) + alpha * links.logistic(beta * (gap - slow))
