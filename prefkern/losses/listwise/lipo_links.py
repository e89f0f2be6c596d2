"""LiPO's six unweighted list losses: pairs, points, list MLE and softmax on beta * log-ratio."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core, links
from ..record import Loss
from .lipo import lipo
from .plackett_luce import plackett_luce


def pair_logistic(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
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
        scores: `[S]` log-ratio of each response.
        labels: `[S]` relevance, higher is better; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.05.
        weights: None (1), "labeldiff" (y_i - y_j) or "lambda" (see `lipo`); default None.
        pair_reduction: "sum" (paper) or "mean" over the strict pairs of a list, default "sum".
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; a list without a strict pair gives 0.

    Raises:
        ValueError: beta <= 0, an unknown option, shapes that do not fit.
    """
    return lipo(
        scores, labels, cu_groups, beta=beta, variant="pair" if weights is None else weights,
        pair_reduction=pair_reduction, backend=backend,
    )  # fmt: skip


def pair_hinge(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
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
        scores: `[S]` log-ratio of each response.
        labels: `[S]` relevance, higher is better; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.05.
        margin: In units after beta, default 1.
        pair_reduction: "sum" (paper) or "mean" over the strict pairs of a list, default "sum".
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; the derivative is 0 at the kink.

    Raises:
        ValueError: beta <= 0, an unknown option, shapes that do not fit.
    """
    return lipo(
        scores, labels, cu_groups, beta=beta, variant="hinge", margin=margin,
        pair_reduction=pair_reduction, backend=backend,
    )  # fmt: skip


def point_mse(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
) -> Tensor:  # [G]
    """Squared distance of each score from its label.

    l = sum_i (y_i - s_i)^2,  s = beta logratio

    Liu et al. 2024 (arXiv 2402.01878), eq. 9.

    Args:
        scores: `[S]` log-ratio of each response.
        labels: `[S]` target of the score; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.05.

    Returns:
        Unreduced loss `[G]`; a list of one counts.

    Raises:
        ValueError: beta <= 0, shapes that do not fit.
    """
    core.positive("beta", beta)
    label = core.labels_like(labels, scores)
    return core.group_sum(links.squared(label - beta * scores), labels, cu_groups)


def point_sigmoid(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
) -> Tensor:  # [G]
    """Cross-entropy of sigmoid(score) with a label in [0, 1].

    l = sum_i softplus(s_i) - y_i s_i,  s = beta logratio

    Liu et al. 2024 (arXiv 2402.01878), eq. 10.

    Args:
        scores: `[S]` log-ratio of each response.
        labels: `[S]` probability that the response is good; clipped to [0, 1] as in rax. NaN
            removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.05.

    Returns:
        Unreduced loss `[G]`; a list of one counts.

    Raises:
        ValueError: beta <= 0, shapes that do not fit.
    """
    core.positive("beta", beta)
    label = core.labels_like(labels, scores).clamp(0.0, 1.0)
    # y softplus(-s) + (1 - y) softplus(s): no difference of two large numbers.
    return core.group_sum(links.logistic(beta * scores, label, 1.0 - label), labels, cu_groups)


def list_mle(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
    ties: str = "stable",
    item_gain: str = "none",
    topk: int | Tensor | None = None,  # [G]
    backend: str = "auto",
) -> Tensor:  # [G]
    """Plackett-Luce likelihood of the label order, with LiPO's beta and rax's tie policy.

    l = sum over ranks i <= topk of log sum_{j not before i} exp(s_j) - s_i,  s = beta logratio

    Liu et al. 2024 (arXiv 2402.01878), eq. 7.

    Args:
        scores, labels, cu_groups: As in `plackett_luce`.
        beta: Strength of the pull to the reference, > 0, default 0.05.
        ties: "stable" (the stored order is trained), "breslow" or "strict"; default "stable".
        item_gain: "none", or "exp2" to weigh each rank by 2^y - 1; default "none".
        topk: Number of ranks that count, int or `[G]` integers >= 1, default None (all).
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; a list of one gives 0.

    Raises:
        ValueError: beta <= 0, an unknown option, topk < 1, shapes that do not fit.
    """
    return plackett_luce(
        scores, labels, cu_groups, beta=beta, topk=topk, ties=ties, item_gain=item_gain,
        backend=backend,
    )  # fmt: skip


def softmax(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    beta: float = 0.05,
    target: str = "sum",
    alpha: float = 1.0,
    backend: str = "auto",
) -> Tensor:  # [G]
    """Cross-entropy of the scores' softmax with a target distribution made from the labels.

    l = -sum_i q_i (s_i - log sum_j exp s_j),  s = beta logratio

    Liu et al. 2024 (arXiv 2402.01878), eq. 11 (target "sum"); "none" is what its published calls
    compute; "softmax" with alpha = 1 is ListNet's top-one form.

    Args:
        scores: `[S]` log-ratio of each response.
        labels: `[S]` relevance, higher is better, >= 0 with target "sum"; NaN removes a response.
        cu_groups: `[G+1]` boundaries of the lists.
        beta: Strength of the pull to the reference, > 0, default 0.05.
        target: q from "sum" (y / sum y), "none" (y) or "softmax" (softmax(y / alpha)); default
            "sum".
        alpha: Temperature of target "softmax", > 0, default 1.
        backend: Of the list_rank op, default "auto".

    Returns:
        Unreduced loss `[G]`; a list of one gives 0.

    Raises:
        ValueError: beta or alpha <= 0, an unknown target, negative labels with "sum", shapes.
    """
    core.positive("beta", beta)
    options: dict[str, Any] = {"alpha": alpha} if target == "softmax" else {}
    return list_rank(
        beta * scores, labels, cu_groups, family="softmax", target=target, backend=backend,
        **options,
    )  # fmt: skip


PAIR_LOGISTIC, PAIR_HINGE, POINT_MSE, POINT_SIGMOID, LIST_MLE, SOFTMAX = (
    Loss(
        fn,
        fn.__name__,
        "listwise",
        needs_reference=True,
        status="paper read; values and gradients checked against rax away from ties",
        source=f"arXiv 2402.01878 eq. {equation}",
        rewards=core.logratio_rewards,
    )
    for fn, equation in (
        (pair_logistic, 5), (pair_hinge, 6), (point_mse, 9), (point_sigmoid, 10), (list_mle, 7),
        (softmax, 11),
    )
)  # fmt: skip
