"""EXO on pairs: reverse KL from the model's preference to a smoothed label."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2402.00856 eq. 16",
    status="checked against TRL; authors' code read",
    reference=True,
)
def exo_pair(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.001,
) -> Tensor:  # [P]
    """EXO: KL between the model's pair preference and the label smoothed by eps.

    l = S(m) (log S(m) - log(1 - eps)) + S(-m) (log S(-m) - log eps),  S = sigmoid,
    m = beta (logratio(chosen) - logratio(rejected))

    Ji et al. 2024 (arXiv 2402.00856), eq. 16. The gradient vanishes at both ends, so a badly
    ordered pair gets no signal.

    Args:
        label_smoothing: eps in (0, 0.5]; 0 would make the loss infinite.
    """
    core.positive("beta", beta)
    return links.exo(beta * core.logratio_gap(chosen, rejected), label_smoothing)
