"""Noise-contrastive alignment: InfoNCA and NCA on lists with rewards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...ops.list_rank import list_rank
from .. import core
from ..declare import listwise
from ..lists import Lists


@listwise(source="arXiv 2402.05369", status="checked against the authors' code", reference=True)
def infonca(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.01,
    alpha: float = 1e-4,
    backend: str = "auto",
) -> Tensor:  # [G]
    """InfoNCA: cross-entropy of the scores' softmax with the rewards' softmax.

    l = -sum_i q_i (s_i - log sum_j exp s_j),  q = softmax(y / alpha),  s = beta logratio

    Chen et al. 2024 (arXiv 2402.05369). A list of two with alpha -> 0 is DPO.

    Args:
        alpha: Temperature of the rewards, > 0; the default is almost one-hot.

    Returns:
        Unreduced loss `[G]`; a list of one gives 0.
    """
    core.positive("beta", beta)
    return list_rank(
        beta * scores, relevance, cu_groups, family="softmax", target="softmax", alpha=alpha,
        backend=backend,
    )  # fmt: skip


@listwise(source="arXiv 2402.05369", status="checked against the authors' code", reference=True)
def nca(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.01,
    alpha: float = 1e-4,
    backend: str = "auto",
) -> Tensor:  # [G]
    """NCA: tells answers from noise one by one, so that absolute likelihood counts.

    l = -sum_i q_i log sigmoid(s_i) - 1/K sum_i log sigmoid(-s_i),
    q = softmax(y / alpha),  s = beta logratio

    Chen et al. 2024 (arXiv 2402.05369). `nca_pair` is the list of two with one-hot q.

    Args:
        alpha: Temperature of the rewards, > 0; the default is almost one-hot.

    Returns:
        Unreduced loss `[G]`; a list of one counts.
    """
    core.positive("beta", beta)
    core.positive("alpha", alpha)
    lists = Lists(beta * scores, relevance, cu_groups, backend)
    s, y = lists.score, lists.relevance / alpha
    weight = torch.where(lists.valid, torch.exp(y - lists.spread(lists.most(y))), 0.0)
    q = weight / lists.spread(lists.sum(weight))
    share = 1.0 / lists.spread(lists.size())
    return lists.loss(lists.sum(-q * logsigmoid(s) - share * logsigmoid(-s)))
