"""D2O: one human-labelled bad answer against self-generated ones."""

from __future__ import annotations

from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise
from ..record import Part


@pairwise(
    source="arXiv 2403.03419 eq. 3",
    status="two independent notes agree; no official code found",
    reference=True,
    parts=(
        Part(
            "self_samples",
            "one stored answer per prompt stands for the K self-samples, and one reference for two",
            "samples of the policy at every step",
        ),
    ),
)
def d2o(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    beta: float = 0.1,
    alpha: float = 0.1,
) -> Tensor:  # [P]
    """D2O: the mean log-ratio of self-samples over a worse reference against a rejected answer over
    a better one.

    l = softplus(-m),  m = beta mean_k logratio(chosen_k) - alpha logratio(rejected)

    Duan et al. 2024 (arXiv 2403.03419), eq. 3. The two sides may have two reference models: give
    each its own `ref_logp`.

    Args:
        chosen: Statistics of K >= 1 self-samples per prompt, `[P, K]` (or `[P]` for K = 1); needs
            `logp`, and `ref_logp` under the more harmful reference.
        rejected: Statistics of the rejected answer `[P]`; needs `logp`, and `ref_logp` under the
            more helpful reference.
        beta: Strength on the self-samples, > 0.
        alpha: Strength on the rejected answer, > 0.
    """
    core.positive("beta", beta)
    core.positive("alpha", alpha)
    samples = chosen.logratio
    if samples.dim() == 2:
        if samples.shape[1] == 0:
            raise ValueError("d2o needs at least one self-sample per prompt, got [P, 0].")
        samples = samples.mean(1)
    return links.logistic(core.difference(beta * samples, alpha * rejected.logratio))
