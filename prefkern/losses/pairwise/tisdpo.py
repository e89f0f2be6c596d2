"""TIS-DPO: DPO whose tokens weigh what two contrastive models make of them."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise
from ..weights import model_ratios


def _reads(*, alpha: float = 0.0, **_: object) -> tuple[str, ...]:
    return ("logp", "rkl") if alpha else ("logp",)


@pairwise(
    source="arXiv 2410.04350 eq. 19",
    status="loss and logit gradients checked against the authors' code, weights given; bounds "
    "of the weights second-hand",
    reference=True,
    reads=_reads,
    weights=model_ratios.tisdpo,
)
def tisdpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.1,
    alpha: float = 0.0,
) -> Tensor:  # [P]
    """TIS-DPO: logistic loss of token-weighted log-ratios, optionally less a weighted KL.

    l = softplus(-beta [logratio(chosen) - logratio(rejected)
                        - alpha (rkl(chosen) - rkl(rejected))])

    with every token weighted by prefkern.losses.weights.tisdpo; rkl = sum of
    KL(policy || reference), with gradient. Note its sign, opposite to TDPO's.

    Liu et al. 2024 (arXiv 2410.04350). The paper has alpha = 1, the released code none by default
    and 0.5 where switched on.

    Args:
        chosen, rejected: Weighted statistics of the two answers, each field `[P]`; needs `logp`,
            `ref_logp`, and `rkl` for alpha != 0.
        alpha: Weight of the KL difference, >= 0; at 0 no KL is computed.
    """
    core.positive("beta", beta)
    core.not_negative("alpha", alpha)
    gap = core.logratio_gap(chosen, rejected)
    if alpha:
        gap = gap - alpha * core.difference(chosen.require("rkl"), rejected.require("rkl"))
    return links.logistic(beta * gap)
