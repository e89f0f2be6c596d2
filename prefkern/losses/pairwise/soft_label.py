"""DPO with a probability as label: OSP, MCTS-DPO and other soft preferences."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2405.14103",
    status="loss form second-hand; OSP's pairing not verified",
    reference=True,
)
def soft_label(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    pref_prob: Tensor,  # [P]
    beta: float = 0.1,
) -> Tensor:  # [P]
    """Soft-label DPO: cross-entropy between a preference probability and the model's.

    l = q softplus(-m) + (1 - q) softplus(m),  m = beta (logratio(chosen) - logratio(rejected))

    OSP (arXiv 2405.14103) with the model's own preference strength as q; MCTS-DPO uses
    q = 1 - min(1 - confidence, 0.5). q = 1 is DPO, q = 0.5 pulls the margin to 0.

    Args:
        pref_prob: `[P]` probability in [0, 1] that chosen is better, q. Constant.
    """
    core.positive("beta", beta)
    margin = beta * core.logratio_gap(chosen, rejected)
    q = core.data("pref_prob", pref_prob, margin)
    core.probability("pref_prob", q)
    return links.logistic(margin, q, 1.0 - q)
