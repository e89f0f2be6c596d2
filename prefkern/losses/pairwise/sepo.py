"""SePO: only the tokens that an oracle finds telling are trained."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise
from ..weights import model_ratios


@pairwise(
    source="arXiv 2408.13518",
    status="second-hand description; no official code found",
    weights=model_ratios.sepo,
    rewards=core.logp_rewards,
)
def sepo(chosen: SeqStats, rejected: SeqStats, *, beta: float = 2.0) -> Tensor:  # [P]
    """SePO (selective preference optimization): mean log-probabilities of selected tokens.

    l = softplus(-beta (mean_selected log p(chosen) - mean_selected log p(rejected)))

    with the share `keep` of tokens of highest oracle reward in a chosen answer, of lowest in a
    rejected one (weight stage prefkern.losses.weights.sepo); no reference model.

    Yang et al. 2024 (arXiv 2408.13518).

    Args:
        chosen, rejected: Weighted statistics of the two answers, each field `[P]`.
    """
    core.positive("beta", beta)
    gap = core.difference(chosen.require("logp"), rejected.require("logp"))
    return links.logistic(beta * gap)
