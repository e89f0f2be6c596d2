"""Flex-DPO: separate strengths for the chosen and the rejected answer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


def _rewards(seq: SeqStats, *, beta_plus: float, **_: Any) -> Tensor:
    return beta_plus * seq.logratio


@pairwise(
    source="arXiv 2406.07327 sec. 4.3",
    status="second-hand description; no official code found",
    reference=True,
    rewards=_rewards,
)
def flex_dpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta_plus: float = 0.1,
    beta_minus: float = 0.08,
) -> Tensor:  # [P]
    """Flex-DPO: DPO with a weaker push on the rejected answer.

    l = softplus(-(beta_plus logratio(chosen) - beta_minus logratio(rejected)))

    Yan et al. 2024 (arXiv 2406.07327), section 4.3.

    Args:
        beta_plus: Strength on the chosen answer, > 0.
        beta_minus: Strength on the rejected answer, > 0.
    """
    core.positive("beta_plus", beta_plus)
    core.positive("beta_minus", beta_minus)
    margin = core.difference(beta_plus * chosen.logratio, beta_minus * rejected.logratio)
    return links.logistic(margin)
