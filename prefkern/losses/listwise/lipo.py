"""LiPO: preference optimization as learning to rank; lambda weights by default."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core
from ..record import Loss


def lipo(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
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

    with tau the rank of an item by its current score. Responses should be stored in random order:
    at the first step all scores tie and tau is the order of storage.

    Liu et al. 2024 (arXiv 2402.01878), eq. 8 (lambda), eq. 5 (pair), eq. 6 (hinge).

    Args:
        scores: `[S]` log-ratio of each response.
        labels: `[S]` relevance, higher is better, best in [0, 1]; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.05.
        variant: "lambda", "pair" (all w = 1), "labeldiff" (w = |y_i - y_j|) or "hinge"; default
            "lambda".
        gain: "exp2" or "linear" in y, default "exp2" (lambda).
        log_base: Of the discount, "e" or "2", default "e" (lambda).
        form: "dcg", or "dcg2" with the discount of rank differences; default "dcg" (lambda).
        normalize: Divides gains by the ideal DCG, default False (lambda).
        topn: Discount 0 beyond this rank; 0, the default, is no limit (lambda).
        rank_source: tau from "score" or "label", default "score" (lambda).
        tie_rank: Tied scores take "position" order or the "average" discount; default "position"
            (lambda).
        margin: Hinge margin after beta, default 1 (hinge).
        pair_reduction: "sum" (paper) or "mean" over the strict pairs of a list, default "sum".
        scale_by_list_size: Multiplies by the list's size as rax does, default False.
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; a list without a strict pair gives 0.

    Raises:
        ValueError: beta <= 0, an unknown variant or option, shapes that do not fit.
    """
    core.positive("beta", beta)
    core.choice("variant", variant, ("lambda", "pair", "labeldiff", "hinge"))
    shared: dict[str, Any] = {
        "pair_reduction": pair_reduction,
        "scale_by_list_size": scale_by_list_size,
    }
    if variant == "hinge":
        return list_rank(
            beta * scores,
            labels,
            cu_groups,
            family="hinge",
            margin=margin,
            backend=backend,
            **shared,
        )
    return list_rank(
        beta * scores,
        labels,
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
        backend=backend,
        **shared,
    )


LIPO = Loss(
    lipo,
    "lipo",
    "listwise",
    needs_reference=True,
    status="paper read; values and gradients checked against rax",
    source="arXiv 2402.01878 eq. 5, 6, 8",
    rewards=core.logratio_rewards,
)
