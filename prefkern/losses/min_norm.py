"""The shortest convex combination of several losses' gradients (multi-gradient descent)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_TOLERANCE = 1e-12  # of an inner product, relative to the longest gradient's square
_ROUNDS = 1000  # the method ends after a few rounds per gradient; this bounds a rounding cycle


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
