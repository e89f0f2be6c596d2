"""D2O over a list: K self-samples against a human-labelled bad answer."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import core, links
from ..declare import listwise
from ..lists import Lists


@listwise(
    source="arXiv 2403.03419 eq. 3",
    status="two independent notes agree; no official code found",
    reference=True,
)
def d2o_list(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.1,
    alpha: float = 0.1,
    backend: str = "auto",
) -> Tensor:  # [G]
    """D2O with any number of self-samples: their mean log-ratio against that of the bad answer.

    l = softplus(-m),  m = beta mean_{best} logratio - alpha mean_{others} logratio

    Duan et al. 2024 (arXiv 2403.03419), eq. 3, where the best are K = 11 self-samples and the one
    other is the labelled answer; `d2o` is K = 1 as a pair. The two sides may have two reference
    models: give each its own `ref_logp`.

    Args:
        relevance: `[S]`; the highest of a list are its self-samples, all lower ones its bad
            answers; NaN leaves an answer out.
        beta: Strength on the self-samples, > 0.
        alpha: Strength on the bad answers, > 0.

    Returns:
        Unreduced loss `[G]`; 0 for a list without one of the two.
    """
    core.positive("beta", beta)
    core.positive("alpha", alpha)
    lists = Lists(scores, relevance, cu_groups, backend)
    best = lists.relevance == lists.spread(lists.most(lists.relevance))

    def mean(side: Tensor) -> Tensor:  # [S] bool -> [G]
        return lists.sum(torch.where(side, lists.score, 0.0)) / lists.sum(side.double()).clamp(
            min=1.0
        )

    both = (lists.sum(best.double()) > 0) & (lists.sum((~best).double()) > 0)
    found = links.logistic(beta * mean(best) - alpha * mean(~best))
    return lists.loss(torch.where(both, found, 0.0))
