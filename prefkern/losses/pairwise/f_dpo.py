"""f-DPO: DPO's margin under another divergence from the reference."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


@pairwise(
    source="arXiv 2309.16240", status="checked against the authors' code and TRL", reference=True
)
def fdpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.1,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> Tensor:  # [P]
    """f-DPO: logistic loss of the margin of f-divergence scores of the log-ratios.

    l = softplus(-m),  m = beta (phi(logratio(chosen)) - phi(logratio(rejected))),
    phi(a) = a (reverse_kl), 1 - e^-a (forward_kl), log 2 + log sigmoid(a) (js),
    (1 - e^(-alpha a)) / alpha (alpha)

    Wang et al. 2023 (arXiv 2309.16240). Exponents are capped at 80. alpha is the paper's: TRL since
    0.29 takes 1 - alpha.

    Args:
        divergence: "reverse_kl" (DPO), "forward_kl", "js" or "alpha".
        alpha: Of the alpha divergence, in [0, 1].
    """
    core.positive("beta", beta)
    core.choice("divergence", divergence, DIVERGENCES)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}.")
    score = {
        "reverse_kl": lambda a: a,
        "forward_kl": links.forward_kl_score,
        "js": links.jensen_shannon_score,
        "alpha": lambda a: links.alpha_score(a, alpha),
    }[divergence]
    return links.logistic(beta * core.difference(score(chosen.logratio), score(rejected.logratio)))
