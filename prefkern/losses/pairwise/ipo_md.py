"""IPO-MD: IPO on pairs drawn from the geometric mixture of policy and reference."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


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
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`, and
            `length` for reduction="mean".
        preference_prob: P in [0, 1] that the first answer is preferred, number or `[P]`, default 1.
        tau: > 0, default 0.1; the target margin of a sure preference is 1 / (2 tau) nats.
        reduction: Log-ratios as "sum" (paper) or "mean" over tokens, default "sum".

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: tau <= 0, an unknown reduction, shapes that differ.
    """
    core.positive("tau", tau)
    core.choice("reduction", reduction, ("sum", "mean"))
    field = "logratio" if reduction == "sum" else "mean_logratio"
    margin = core.difference(getattr(chosen, field), getattr(rejected, field))
    preference = core.per_item("preference_prob", preference_prob, margin)
    return links.squared(margin - (preference - 0.5) / tau)


def _rewards(seq: SeqStats, *, tau: float = 0.1, **_: object) -> Tensor:
    return tau * seq.logratio


IPO_MD = Loss(
    ipo_md,
    "ipo_md",
    "pairwise",
    needs_reference=True,
    status="second-hand; no official code",
    source="arXiv 2403.08635",
    rewards=_rewards,
)
