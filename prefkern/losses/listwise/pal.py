"""PAL: rewards as distances to a user's ideal point, a mixture of a few prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.list_rank import list_rank
from .. import core
from ..declare import listwise
from ..lists import Lists
from ..record import Part
from .lipo import pair_hinges


@listwise(
    source="arXiv 2406.08469",
    status="scores and loss executed against the authors' code; paper read in abstract only",
    score="mean_logp",
    parts=(
        Part(
            "ideal_points",
            "it would be a hinge on mean log-probabilities, without users and prototypes",
            "--head reward with a column user",
            refused=True,
        ),
    ),
)
def pal(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    link: str = "hinge",
    margin: float = 1.0,
    pair_reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:  # [G]
    """PAL: comparisons of ideal-point scores, the nearer answer being the preferred one.

    l = 1 / |pairs| sum_{y_i > y_j} max(0, margin - (r_i - r_j))     link "hinge"
    l = 1 / |pairs| sum_{y_i > y_j} softplus(-(r_i - r_j))           link "logistic"
    r = -|x - a|  or  c cos(x, a),  a = sum_k softmax(u)_k p_k

    with x the answer, p_k K prototypes shared by all users and u the K numbers of the user who
    compared (`ideal_points`, `ideal_point_scores`; `bound_penalty` is the regulariser).

    Chen et al. 2024 (arXiv 2406.08469), as in the authors' code: distance with the hinge, cosine
    with the logistic link. The code averages over the tokens of an answer where it scores each;
    pass the score of the last one, or a mean. Its option of distances with the logistic link
    prefers the farther answer and is not followed. Through preference_loss the score is the mean
    log-probability per token.

    Args:
        scores: `[S]` reward r of each answer for the user of its group.
        cu_groups: `[G+1]` boundaries of the answers that one user compared.
        link: "hinge" or "logistic".
        margin: Of the hinge.

    Returns:
        Unreduced loss `[G]`; the derivative at the kink is 0, a group without a strict pair gives
        0.
    """
    core.choice("link", link, ("hinge", "logistic"))
    if link == "hinge":
        return pair_hinges(Lists(scores, relevance, cu_groups, backend), margin, pair_reduction)
    return list_rank(
        scores, relevance, cu_groups, family="pair", pair_reduction=pair_reduction, backend=backend
    )


def ideal_points(
    prototypes: Tensor,  # [K, D] or [S, K, D]
    user_logits: Tensor,  # [S, K]
) -> Tensor:  # [S, D]
    """The ideal point of each answer's user: sum_k softmax(user_logits)_k prototypes_k.

    Args:
        prototypes: `[K, D]` points shared by all prompts (PAL-A), or `[S, K, D]`, K points for the
            prompt of each answer (PAL-B). With gradient.
        user_logits: `[S, K]` row of each answer's user, with gradient.

    Returns:
        `[S, D]`, inside the convex hull of the prototypes.

    Raises:
        ValueError: shapes that do not fit.
    """
    if prototypes.dim() not in (2, 3) or user_logits.dim() != 2:
        raise ValueError(
            "prototypes must be [K, D] or [S, K, D] and user_logits [S, K], got "
            f"{list(prototypes.shape)} and {list(user_logits.shape)}."
        )
    if user_logits.shape[-1] != prototypes.shape[-2] or (
        prototypes.dim() == 3 and len(prototypes) != len(user_logits)
    ):
        raise ValueError(
            f"user_logits {list(user_logits.shape)} must have one column per prototype (and one "
            f"row per answer), got prototypes {list(prototypes.shape)}."
        )
    weight = torch.softmax(user_logits, -1)
    if prototypes.dim() == 2:
        return weight @ prototypes
    return (weight[:, :, None] * prototypes).sum(1)


def ideal_point_scores(
    items: Tensor,  # [S, D]
    points: Tensor,  # [S, D]
    *,
    measure: str = "distance",
    scale: float | Tensor = 1.0,  # []
) -> Tensor:  # [S]
    """scale times minus the distance, or the cosine, between each answer and its ideal point.

    Args:
        items: `[S, D]` embedding of each answer in the preference space.
        points: `[S, D]` ideal point of its user, from `ideal_points`.
        measure: "distance" (Euclidean) or "cosine", default "distance".
        scale: Number or 0-d tensor, default 1; the authors learn it for the cosine, from 1 / 0.07
            up to 100.

    Returns:
        `[S]`; at distance 0 the derivative is 0.

    Raises:
        ValueError: an unknown measure, shapes that differ.
    """
    core.choice("measure", measure, ("distance", "cosine"))
    if items.shape != points.shape or items.dim() != 2:
        raise ValueError(
            f"items and points must both be [S, D], got {list(items.shape)} and "
            f"{list(points.shape)}."
        )
    if measure == "distance":
        return -scale * torch.linalg.vector_norm(items - points, dim=-1)
    return scale * torch.nn.functional.cosine_similarity(items, points, dim=-1)


def bound_penalty(
    points: Tensor,  # [S, D]
    *,
    upper_bound: float = 4.0,
    weight: float = 1.0,
) -> Tensor:  # []
    """weight times the sum over rows of max(0, |a| - upper_bound), the authors' regulariser."""
    return weight * (torch.linalg.vector_norm(points, dim=-1) - upper_bound).clamp(min=0.0).sum()
