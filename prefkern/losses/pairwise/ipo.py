"""Identity preference optimization."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


@pairwise(
    source="arXiv 2310.12036 eq. 17",
    status="mean form checked against TRL, sum form against the DPO authors' code",
    reference=True,
    reads=("logp", "length"),
)
def ipo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.1,
    norm: str = "mean",
) -> Tensor:  # [P]
    """IPO: squared distance of the log-ratio margin from 1 / (2 beta).

    l = (m - 1 / (2 beta))^2,  m = logratio(chosen) - logratio(rejected), per token for norm="mean"

    Azar et al. 2023 (arXiv 2310.12036), eq. 17. The paper writes sums; its published numbers and
    most trainers use means. With sums a beta of 0.01 or less is usual.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `logp`, `ref_logp`,
            and `length` for norm="mean".
        beta: The paper's tau, > 0; the target margin is 1 / (2 beta) nats.
        norm: "mean" divides each log-ratio by its length, "sum" does not.
    """
    core.positive("beta", beta)
    core.choice("norm", norm, ("mean", "sum"))
    if norm == "mean":
        margin = core.difference(chosen.mean_logratio, rejected.mean_logratio)
    else:
        margin = core.difference(chosen.logratio, rejected.logratio)
    return links.squared(margin - 1.0 / (2.0 * beta))
