"""Length-normalised DPO."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2407.15229",
    status="checked against TRL; paper formula second-hand",
    reference=True,
    reads=("logp", "length"),
)
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
        beta: Scale of the margin per token, > 0; useful values are 1 to 10.
    """
    core.positive("beta", beta)
    margin = beta * core.difference(chosen.mean_logratio, rejected.mean_logratio)
    return links.smoothed_logistic(margin, label_smoothing)
