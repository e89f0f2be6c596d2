"""MORE: one reward model for several preference sources, weighted so that no source loses."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...ops import ragged
from ...ops.list_rank import list_rank
from .. import core
from ..declare import listwise
from ..record import Part

NORMALIZERS = ("none", "l2", "loss", "loss+")
_TOLERANCE = 1e-12  # of an inner product, relative to the longest gradient's square
_ROUNDS = 1000  # the method ends after a few rounds per gradient; this bounds a rounding cycle


@listwise(
    source="arXiv 2312.07401",
    status="loss executed against the authors' code; paper read in abstract only",
    score="mean_logp",
    parts=(
        Part(
            "source_weights",
            "there would be no gradients at a reward head to weigh the sources by",
            "--head reward with a column source",
            refused=True,
        ),
    ),
)
def more(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    source: Tensor,  # [G]
    source_weights: Tensor,  # [n]
    pair_reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:  # [G]
    """MORE: Bradley-Terry loss of each preference source times the source's weight of this step.

    l = n lambda_k 1 / |pairs| sum_{y_i > y_j} softplus(-(r_i - r_j)),
    k = source of the group, n = number of sources in the batch,
    lambda = argmin over the simplex of |sum_k lambda_k g_k|,  g_k = gradient of source k's loss

    The mean over groups of equally frequent sources is sum_k lambda_k L_k. lambda is a constant,
    made anew each step by `source_weights` from gradients at the reward head (`head_gradients`).

    Zeng et al. 2023 (arXiv 2312.07401), as in the authors' code, which pools the pairs of the whole
    batch (the same where every group has as many). Scores come from a reward head; through
    preference_loss the score is the mean log-probability per token.

    Args:
        scores: `[S]` reward r of each answer.
        source: `[G]` integers in [0, n), the preference data each group comes from.
        source_weights: `[n]` lambda, constant, summing to 1 over the sources of the batch:
            prefkern.losses.listwise.more.source_weights(...).

    Returns:
        Unreduced loss `[G]`; a group without a strict pair gives 0.
    """
    groups = cu_groups.numel() - 1
    if source_weights.dim() != 1:
        raise ValueError(
            f"source_weights must be [n], one per source, got {list(source_weights.shape)}."
        )
    core.real("source_weights", source_weights)
    core.not_negative("source_weights", source_weights)
    _check_source(source, groups, len(source_weights))
    loss = list_rank(
        scores, relevance, cu_groups, family="pair", pair_reduction=pair_reduction, backend=backend
    )
    weight = source_weights.detach().to(loss.dtype)
    present = torch.zeros_like(weight).index_fill(0, source.long(), 1.0).sum()
    return present * weight[source.long()] * loss


def head_gradients(
    features: Tensor,  # [S, D]
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    source: Tensor,  # [G]
    sources: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # [n, D], [n]
    """Gradient of each source's mean loss with respect to a linear reward head, and that loss.

    For r = features w the gradient is sum_s (dL_k / dr_s) features_s: one backward through the
    scores alone, whatever the model below costs. The authors take the head's gradient for the
    whole model's as well.

    Args:
        features: `[S, D]` inputs of the head.
        scores, relevance, cu_groups, source: As in `more`.
        sources: n.
        backend: Of the list_rank op, default "auto".

    Returns:
        (`[n, D]`, `[n]`), without gradient; 0 for a source that is not in the batch.

    Raises:
        ValueError: features are not `[S, D]`, source is not `[G]` integers, shapes that do not fit.
    """
    if features.dim() != 2 or len(features) != scores.numel():
        raise ValueError(
            f"features must be [S, D] = [{scores.numel()}, D], got {list(features.shape)}."
        )
    _check_source(source, cu_groups.numel() - 1, sources)
    index = source.long()
    leaf = scores.detach().requires_grad_()
    with torch.enable_grad():
        loss = list_rank(
            leaf, relevance, cu_groups, family="pair", pair_reduction="mean", backend=backend
        )
        count = torch.zeros(sources, dtype=loss.dtype, device=loss.device)
        count = count.index_add(0, index, torch.ones_like(loss)).clamp(min=1.0)
        mean = loss / count[index]
        (slope,) = torch.autograd.grad(mean.sum(), leaf)
    owner = index[ragged.owner(cu_groups, scores.numel())]
    rows = slope[:, None] * features.detach().to(slope.dtype)
    gradient = rows.new_zeros(sources, features.shape[1]).index_add(0, owner, rows)
    return gradient, count.new_zeros(sources).index_add(0, index, mean.detach())


def source_weights(
    gradients: Tensor,  # [n, D]
    losses: Tensor | None = None,  # [n]
    *,
    present: Tensor | None = None,  # [n] bool
    normalize: str = "none",
) -> Tensor:  # [n]
    """lambda of `more`: weights of the shortest convex combination of the sources' gradients.

    Args:
        gradients: `[n, D]` of the sources' losses. The authors may average them over steps before:
            (1 - a) old + a new, their default a = 1 keeps the new ones alone.
        losses: `[n]` value of each source's loss, for normalize "loss" and "loss+".
        present: `[n]` bool, sources that are in the batch; default None, those whose gradient is
            not 0. The others get weight 0.
        normalize: Divisor of each gradient first: "none", "l2" its norm, "loss" (1 + loss) over
            their sum, "loss+" norm times loss; default "none".

    Returns:
        `[n]`, >= 0, summing to 1 over the present sources (all 0 where there is none).

    Raises:
        ValueError: an unknown normalize, losses missing where it needs them, shapes that do not
            fit, gradients that are not finite.
    """
    core.choice("normalize", normalize, NORMALIZERS)
    if gradients.dim() != 2:
        raise ValueError(f"gradients must be [n, D], got {list(gradients.shape)}.")
    g = gradients.detach()
    norm = torch.linalg.vector_norm(g, dim=1)
    there = norm > 0 if present is None else core.boolean("present", present, norm)
    if normalize in ("l2", "loss+"):
        g = g / torch.where(norm > 0, norm, 1.0)[:, None]
    if normalize in ("loss", "loss+"):
        value = core.data("losses", losses, norm)
        if normalize == "loss":
            value = 1.0 + value
            value = value / torch.where(there, value, 0.0).sum()
        g = g / torch.where(there & (value > 0), value, 1.0)[:, None]
    found = torch.zeros_like(norm)
    if bool(there.any()):
        found[there] = min_norm_weights(g[there])
    return found


def _check_source(source: Tensor, groups: int, sources: int) -> None:
    core.integers("source", source, 0, sources - 1, "one source per group")
    if source.shape != (groups,):
        raise ValueError(
            f"source must be integers [G] = [{groups}], one per group, got {list(source.shape)}."
        )


def min_norm_weights(gradients: Tensor) -> Tensor:  # [n]
    """Weights of the point nearest to 0 in the convex hull of n gradients.

    argmin over lambda >= 0, sum lambda = 1 of |sum_i lambda_i g_i|^2

    A step against that point lets no loss grow (to first order), or is 0 where no such step exists.
    Desideri 2012; Sener and Koltun 2018 (arXiv 1810.04650). Exact, by Wolfe's method on the n x n
    inner products, where the usual Frank-Wolfe iteration stops at a tolerance.

    Args:
        gradients: `[n, D]`, one row per loss, finite. Read on the host: on a GPU this waits.

    Returns:
        `[n]` in the dtype of gradients, on their device, without gradient.

    Raises:
        ValueError: gradients that are not `[n, D]` with n >= 1, or not finite.
    """
    if gradients.dim() != 2 or gradients.shape[0] == 0:
        raise ValueError(
            f"gradients must be [n, D] with n >= 1, got {list(gradients.shape)}; flatten each."
        )
    g = gradients.detach().double()
    gram = (g @ g.T).cpu().numpy()
    if not np.isfinite(gram).all():
        raise ValueError("gradients must be finite, and so must their inner products.")
    n = len(gram)
    weights = np.zeros(n)
    start = int(np.argmin(np.diag(gram)))
    weights[start] = 1.0
    active = [start]
    slack = _TOLERANCE * max(float(np.diag(gram).max()), np.finfo(np.float64).tiny)
    for _ in range(_ROUNDS):
        product = gram @ weights  # of every gradient with the current point
        nearest = int(np.argmin(product))
        if product[nearest] >= weights @ product - slack or nearest in active:
            break
        active.append(nearest)
        _to_the_nearest_point(gram, weights, active)
    return torch.from_numpy(weights / weights.sum()).to(gradients)


def _to_the_nearest_point(gram: np.ndarray, weights: np.ndarray, active: list[int]) -> None:
    """Moves `weights` to the nearest point of the hull of the active gradients, dropping from
    `active` those that it leaves."""
    while True:
        k = len(active)
        # stationarity and sum 1 of the affine hull; lstsq, since gradients may be parallel
        system = np.zeros((k + 1, k + 1))
        system[0, 1:] = system[1:, 0] = 1.0
        system[1:, 1:] = gram[np.ix_(active, active)]
        right = np.zeros(k + 1)
        right[0] = 1.0
        goal = np.linalg.lstsq(system, right, rcond=None)[0][1:]
        here = weights[active]
        if (goal > 0.0).all():
            weights[active] = goal
            return
        out = goal <= 0.0
        step = float(np.min(here[out] / np.maximum(here[out] - goal[out], 1e-300)))
        moved = np.maximum(here + min(step, 1.0) * (goal - here), 0.0)
        moved[np.argmin(np.where(out, moved, np.inf))] = 0.0
        weights[active] = moved
        active[:] = [a for a, w in zip(active, moved, strict=True) if w > 0.0]
