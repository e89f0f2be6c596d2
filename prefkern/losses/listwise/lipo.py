"""LiPO: preference optimization as learning to rank; lambda weights by default."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core
from ..declare import listwise
from ..lists import Lists
from ..record import GRADES, SHARES


def _labels(*, variant: str, gain: str, normalize: bool, **_: object) -> tuple[float, float] | None:
    if variant != "lambda":
        return None
    return GRADES if gain == "exp2" else SHARES if normalize else None


@listwise.made_for(_labels)(
    source="arXiv 2402.01878 eq. 5, 6, 8",
    status="paper read; values and gradients checked against rax",
    reference=True,
)
def lipo(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
    variant: str = "lambda",
    gain: str = "exp2",
    log_base: str = "e",
    form: str = "dcg",
    normalize: bool = False,
    topn: int = 0,
    rank_source: str = "score",
    tie_rank: str = "position",
    margin: float = 1.0,
    pair_reduction: str = "sum",
    scale_by_list_size: bool = False,
    backend: str = "auto",
) -> Tensor:  # [G]
    """LiPO: logistic loss of every strict pair, weighted by what exchanging the pair would cost.

    l = sum_{y_i > y_j} w_ij softplus(-(s_i - s_j)),  s = beta logratio,
    w_ij = |G_i - G_j| |1 / log(1 + tau_i) - 1 / log(1 + tau_j)|,  G = 2^y - 1

    with tau the rank of an item by its current score. Answers should be stored in random order:
    at the first step all scores tie and tau is the order of storage.

    Liu et al. 2024 (arXiv 2402.01878), eq. 8 (lambda), eq. 5 (pair), eq. 6 (hinge).

    Args:
        relevance: `[S]` numbers, higher is better, best in [0, 1]; NaN leaves an answer out.
        variant: "lambda", "pair" (all w = 1), "labeldiff" (w = |y_i - y_j|) or "hinge".
        gain: "exp2" or "linear" in y (lambda).
        log_base: Of the discount, "e" or "2" (lambda).
        form: "dcg", or "dcg2" with the discount of rank differences (lambda).
        normalize: Divides gains by the ideal DCG (lambda).
        topn: Discount 0 beyond this rank; 0 is no limit (lambda).
        rank_source: tau from "score" or "label" (lambda).
        tie_rank: Tied scores take "position" order or the "average" discount (lambda).
        margin: Hinge margin after beta (hinge).
        scale_by_list_size: Multiplies by the list's size as rax does.

    Returns:
        Unreduced loss `[G]`; a list without a strict pair gives 0.
    """
    core.positive("beta", beta)
    core.choice("variant", variant, ("lambda", "pair", "labeldiff", "hinge"))
    if variant == "hinge":
        lists = Lists(beta * scores, relevance, cu_groups, backend)
        return pair_hinges(lists, margin, pair_reduction, scale_by_list_size)
    return list_rank(
        beta * scores,
        relevance,
        cu_groups,
        family="pair",
        weights="none" if variant == "pair" else variant,
        gain=gain,
        log_base=log_base,
        form=form,
        normalize=normalize,
        topn=topn,
        rank_source=rank_source,
        tie_rank=tie_rank,
        pair_reduction=pair_reduction,
        scale_by_list_size=scale_by_list_size,
        backend=backend,
    )


def pair_hinges(
    lists: Lists, margin: float, pair_reduction: str = "sum", scale_by_list_size: bool = False
) -> Tensor:  # [G]
    """sum_{y_i > y_j} max(0, margin - (s_i - s_j)); the slope is 0 at the kink."""
    core.finite("margin", margin)
    core.choice("pair_reduction", pair_reduction, ("sum", "mean"))

    def hinge(s: Tensor, y: Tensor, s_j: Tensor, y_j: Tensor) -> Tensor:
        return torch.where(y > y_j, torch.relu(margin - (s - s_j)), 0.0)

    found = lists.sum(lists.over_mates(hinge, lists.score, lists.relevance))
    if pair_reduction == "mean":
        found = found / lists.pairs().clamp(min=1.0)
    if scale_by_list_size:
        found = found * lists.size()
    return lists.loss(found)
