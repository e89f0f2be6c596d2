"""IPO-MD: IPO on pairs drawn from the geometric mixture of policy and reference."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


def _rewards(seq: SeqStats, *, tau: float = 0.1, **_: object) -> Tensor:
    return tau * seq.logratio


@pairwise(
    source="arXiv 2403.08635",
    status="second-hand; no official code",
    reference=True,
    reads=("logp", "length"),
    rewards=_rewards,
)
def ipo_md(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    preference_prob: float | Tensor = 1.0,  # [P]
    tau: float = 0.1,
    reduction: str = "sum",
) -> Tensor:  # [P]
    """IPO-MD: squared distance of the policy's margin from (P - 1/2) / tau.

    l = (m - (P - 1/2) / tau)^2,  m = logratio(chosen) - logratio(rejected)

    on answers that were both drawn from softmax((1-b) z + b z_ref), token by token (statistic
    "mix:b"); the loss itself is on the policy, without a correction for that.

    Calandriello et al. 2024 (arXiv 2403.08635). P = 1 is IPO; b = 0 is online IPO.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `logp`, `ref_logp`,
            and `length` for reduction="mean".
        preference_prob: P in [0, 1] that the first answer is preferred, number or `[P]`.
        tau: > 0; the target margin of a sure preference is 1 / (2 tau) nats.
        reduction: Log-ratios as "sum" (paper) or "mean" over tokens.
    """
    core.positive("tau", tau)
    core.probability("preference_prob", preference_prob)
    core.choice("reduction", reduction, ("sum", "mean"))
    field = "logratio" if reduction == "sum" else "mean_logratio"
    margin = core.difference(getattr(chosen, field), getattr(rejected, field))
    preference = core.per_item("preference_prob", preference_prob, margin)
    return links.squared(margin - (preference - 0.5) / tau)
