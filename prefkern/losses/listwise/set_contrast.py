"""Set contrast: answers above the mean reward against all answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import core
from ..declare import listwise
from ..lists import Lists


@listwise(
    source="arXiv 2412.04628",
    status="provisional: from summaries; weight of the low side and alpha not confirmed",
    reference=True,
)
def set_contrast(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
    alpha: float = 1.0,
    backend: str = "auto",
) -> Tensor:  # [G]
    """Weighted contrast of the answers above the mean reward with the whole list.

    l = log sum_i exp(x_i) - log sum_{y_i > mean y} exp(x_i),
    x_i = s_i + alpha |y_i - mean y|,  s = beta logratio

    After summaries of SWEPO (arXiv 2412.04628), which agree on the split and on the weight of the
    answers above the mean; the weight of the others and the default alpha are assumptions.

    Args:
        relevance: `[S]` reward, higher is better; NaN leaves an answer out. A reward equal to the
            mean counts as low.
        alpha: Weight per unit of deviation from the mean; 0 weighs all alike.

    Returns:
        Unreduced loss `[G]`; 0 where all are equally relevant.
    """
    core.positive("beta", beta)
    core.finite("alpha", alpha)
    lists = Lists(beta * scores, relevance, cu_groups, backend)
    y, size = lists.relevance, lists.spread(lists.size()).clamp(min=1.0)
    mean = lists.spread(lists.sum(y)) / size
    mean = mean + lists.spread(lists.sum(y - mean)) / size  # to the last bit
    # In the rewards' own precision: 0.3 is the mean of 0.1, 0.3 and 0.5 in fp32 as well.
    off = y - mean.to(lists.relevance_dtype).double()
    good = lists.differ() & (off > 0)
    x = lists.score + alpha * off.abs()
    found = lists.log_sum_exp(x, good) - lists.log_sum_exp(x, ~good)
    return lists.loss(torch.where(lists.sum(good.double()) > 0, -logsigmoid(found), 0.0))
