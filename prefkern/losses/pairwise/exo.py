"""EXO on pairs: reverse KL from the model's preference to a smoothed label."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


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
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        beta: Strength of the pull to the reference, > 0, default 0.1.
        label_smoothing: eps in (0, 0.5], default 0.001; 0 would make the loss infinite.

    Returns:
        Unreduced loss `[P]`.

    Raises:
        ValueError: beta <= 0, label_smoothing outside (0, 0.5], shapes that differ.
    """
    core.positive("beta", beta)
    return links.exo(beta * core.logratio_gap(chosen, rejected), label_smoothing)


EXO_PAIR = Loss(
    exo_pair,
    "exo_pair",
    "pairwise",
    needs_reference=True,
    status="checked against TRL; authors' code read",
    source="arXiv 2402.00856 eq. 16",
    rewards=core.logratio_rewards,
)
