"""Pairs of a list whose scores are step-weighted log-ratios, in the style of Tree-TPO."""

from __future__ import annotations

from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core
from ..declare import listwise
from ..weights import steps


@listwise(
    source="arXiv 2410.12854",
    status="provisional: own definition in the style of the paper, whose equations were not read",
    reference=True,
    weights=steps.tree_tpo,
)
def tree_tpo(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.5,
    weights: str = "none",
    pair_reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:  # [G]
    """Logistic loss of the pairs of a list on step-weighted log-ratios.

    l = 1 / |pairs| sum_{y_i > y_j} w_ij softplus(-(R_i - R_j)),
    R = beta sum_k c_k (mean log-ratio of step k) / sum_k c_k

    with the step weights of prefkern.losses.weights.tree_tpo, which make R = beta logratio. A
    definition of this package in the style of tree preference optimization (arXiv 2410.12854): the
    paper's equations were not read and its released loss trains the wrong way.

    Args:
        scores: `[S]` step-weighted log-ratio of each answer.
        relevance: `[S]` value of each leaf, higher is better; NaN leaves an answer out. With lambda
            weights 2^y must fit the dtype.
        weights: "none" or "lambda" (see `lipo`).

    Returns:
        Unreduced loss `[G]`; a list without a strict pair gives 0.
    """
    core.positive("beta", beta)
    core.choice("weights", weights, ("none", "lambda"))
    return list_rank(
        beta * scores, relevance, cu_groups, family="pair", weights=weights,
        pair_reduction=pair_reduction, backend=backend,
    )  # fmt: skip
