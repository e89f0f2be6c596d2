"""Contrastive preference optimization: DPO's link on log-probabilities, plus likelihood."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise
from ..record import Supervised


@pairwise(
    source="arXiv 2401.08417 eq. 3",
    status="checked against TRL",
    supervised=Supervised("cpo_alpha", 1.0),
)
def cpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:  # [P]
    """CPO: logistic loss of the summed log-probability margin.

    l = (1 - eps) softplus(-m) + eps softplus(m),  m = beta (logp(chosen) - logp(rejected)),
    objective: mean l + cpo_alpha * NLL(chosen) per token of the batch

    Xu et al. 2024 (arXiv 2401.08417), eq. 3.
    """
    core.positive("beta", beta)
    gap = core.difference(chosen.require("logp"), rejected.require("logp"))
    return links.smoothed_logistic(beta * gap, label_smoothing)
