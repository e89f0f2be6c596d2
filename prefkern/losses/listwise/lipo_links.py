"""LiPO's six unweighted list losses: pairs, points, list MLE and softmax on beta * log-ratio."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core, links
from ..declare import formula, listwise
from ..record import SHARES
from .lipo import lipo
from .plackett_luce import gained_labels, plackett_luce

STATUS = "paper read; values and gradients checked against rax away from ties"


@listwise(source="arXiv 2402.01878 eq. 5", status=STATUS, reference=True)
def pair_logistic(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
    weights: str | None = None,
    pair_reduction: str = "sum",
    backend: str = "auto",
) -> Tensor:  # [G]
    """RankNet on log-ratios: DPO on every strict pair of a list.

    l = sum_{y_i > y_j} w_ij softplus(-(s_i - s_j)),  s = beta logratio

    Liu et al. 2024 (arXiv 2402.01878), eq. 5. A list of two is DPO.

    Args:
        weights: None (1), "labeldiff" (y_i - y_j) or "lambda" (see `lipo`).

    Returns:
        Unreduced loss `[G]`; a list without a strict pair gives 0.
    """
    core.choice("weights", weights, (None, "labeldiff", "lambda"))
    return formula(lipo)(
        scores, relevance, cu_groups, beta=beta, variant=weights or "pair",
        pair_reduction=pair_reduction, backend=backend,
    )  # fmt: skip


@listwise(source="arXiv 2402.01878 eq. 6", status=STATUS, reference=True)
def pair_hinge(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
    margin: float = 1.0,
    pair_reduction: str = "sum",
    backend: str = "auto",
) -> Tensor:  # [G]
    """Hinge (RankSVM, SLiC's normalised form) on every strict pair of a list.

    l = sum_{y_i > y_j} max(0, margin - (s_i - s_j)),  s = beta logratio

    Liu et al. 2024 (arXiv 2402.01878), eq. 6.

    Args:
        margin: In units after beta.

    Returns:
        Unreduced loss `[G]`; the derivative is 0 at the kink.
    """
    return formula(lipo)(
        scores, relevance, cu_groups, beta=beta, variant="hinge", margin=margin,
        pair_reduction=pair_reduction, backend=backend,
    )  # fmt: skip


@listwise(source="arXiv 2402.01878 eq. 9", status=STATUS, reference=True)
def point_mse(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
) -> Tensor:  # [G]
    """Squared distance of each score from its relevance.

    l = sum_i (y_i - s_i)^2,  s = beta logratio

    Liu et al. 2024 (arXiv 2402.01878), eq. 9.

    Args:
        relevance: `[S]` target of the score; NaN leaves an answer out.

    Returns:
        Unreduced loss `[G]`; a list of one counts.
    """
    core.positive("beta", beta)
    target = core.relevance_like(relevance, scores)
    return core.group_sum(links.squared(target - beta * scores), relevance, cu_groups)


@listwise.made_for((0.0, 1.0))(source="arXiv 2402.01878 eq. 10", status=STATUS, reference=True)
def point_sigmoid(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
) -> Tensor:  # [G]
    """Cross-entropy of sigmoid(score) with a relevance in [0, 1].

    l = sum_i softplus(s_i) - y_i s_i,  s = beta logratio

    Liu et al. 2024 (arXiv 2402.01878), eq. 10.

    Args:
        relevance: `[S]` probability that the answer is good; clipped to [0, 1] as in rax. NaN
            leaves an answer out.

    Returns:
        Unreduced loss `[G]`; a list of one counts.
    """
    core.positive("beta", beta)
    target = core.relevance_like(relevance, scores).clamp(0.0, 1.0)
    # y softplus(-s) + (1 - y) softplus(s): no difference of two large numbers.
    return core.group_sum(links.logistic(beta * scores, target, 1.0 - target), relevance, cu_groups)


@listwise.made_for(gained_labels)(source="arXiv 2402.01878 eq. 7", status=STATUS, reference=True)
def list_mle(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
    ties: str = "stable",
    item_gain: str = "none",
    topk: int | Tensor | None = None,  # [G]
    backend: str = "auto",
) -> Tensor:  # [G]
    """Plackett-Luce likelihood of the order of relevance, with LiPO's beta and rax's tie policy.

    l = sum over ranks i <= topk of log sum_{j not before i} exp(s_j) - s_i,  s = beta logratio

    Liu et al. 2024 (arXiv 2402.01878), eq. 7.

    Returns:
        Unreduced loss `[G]`; a list of one gives 0.
    """
    return formula(plackett_luce)(
        scores, relevance, cu_groups, beta=beta, topk=topk, ties=ties, item_gain=item_gain,
        backend=backend,
    )  # fmt: skip


def _shared(*, target: str, **_: object) -> tuple[float, float] | None:
    return SHARES if target == "sum" else None


@listwise.made_for(_shared)(source="arXiv 2402.01878 eq. 11", status=STATUS, reference=True)
def softmax(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
    target: str = "sum",
    alpha: float = 1.0,
    backend: str = "auto",
) -> Tensor:  # [G]
    """Cross-entropy of the scores' softmax with a target distribution made from the relevance.

    l = -sum_i q_i (s_i - log sum_j exp s_j),  s = beta logratio

    Liu et al. 2024 (arXiv 2402.01878), eq. 11 (target "sum"); "none" is what its published calls
    compute; "softmax" with alpha = 1 is ListNet's top-one form.

    Args:
        relevance: `[S]` numbers, higher is better, >= 0 with target "sum"; NaN leaves an answer
            out.
        target: q from "sum" (y / sum y), "none" (y) or "softmax" (softmax(y / alpha)).
        alpha: Temperature of target "softmax", > 0.

    Returns:
        Unreduced loss `[G]`; a list of one gives 0.
    """
    core.positive("beta", beta)
    options: dict[str, Any] = {"alpha": alpha} if target == "softmax" else {}
    return list_rank(
        beta * scores, relevance, cu_groups, family="softmax", target=target, backend=backend,
        **options,
    )  # fmt: skip
