"""Links and scores that preference losses are made of; elementwise, any shape, any float dtype.

A link turns a margin m into a loss l(m); a score turns a log-ratio a into phi(a). Values stay
finite for margins of +-1e4, and the derivative at 0 (policy = reference, every margin of the first
step) and at every kink is the stated one: 0 at a kink.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

EXP_CLAMP = 80.0  # exp(80) = 5.5e34 still fits fp32
LOGP_EPS = 1e-6  # largest mean log-probability whose odds are formed is -LOGP_EPS


def logistic(
    margin: Tensor,
    positive: float | Tensor = 1.0,
    negative: float | Tensor = 0.0,
) -> Tensor:
    """l = c+ softplus(-m) + c- softplus(m); l' = -c+ sigmoid(-m) + c- sigmoid(m).

    Softplus is written as -logsigmoid: torch's own softplus turns linear at 20, 2e-9 off.
    """
    loss = -positive * logsigmoid(margin)
    if isinstance(negative, Tensor) or negative != 0.0:
        loss = loss - negative * logsigmoid(-margin)
    return loss


def smoothed_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """logistic with c+ = 1 - eps, c- = eps: the label is wrong with probability eps in [0, 0.5]."""
    if not 0.0 <= label_smoothing <= 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5], got {label_smoothing}; above 0.5 swap the "
            "answers."
        )
    return logistic(margin, 1.0 - label_smoothing, label_smoothing)


def hinge_loss(margin: Tensor, delta: float = 1.0) -> Tensor:
    """l = max(0, delta - m); l' = -1 where m < delta, 0 at the kink."""
    return torch.relu(delta - margin)


def squared(x: Tensor) -> Tensor:
    """l = x^2."""
    return x * x


def zero_one(margin: Tensor) -> Tensor:
    """l = 1 - sigmoid(m), formed as sigmoid(-m) so that large margins keep their digits."""
    return torch.sigmoid(-margin)


def forward_kl_score(logratio: Tensor) -> Tensor:
    """phi = 1 - exp(-a), exponent capped at 80 (derivative 0 beyond)."""
    return -torch.expm1((-logratio).clamp(max=EXP_CLAMP))


def jensen_shannon_score(logratio: Tensor) -> Tensor:
    """phi = log 2 + log sigmoid(a)."""
    return math.log(2.0) + logsigmoid(logratio)


def alpha_score(logratio: Tensor, alpha: float) -> Tensor:
    """phi = (1 - exp(-alpha a)) / alpha, exponent capped at 80; the identity for |alpha| < 1e-6."""
    if abs(alpha) < 1e-6:
        return logratio
    return -torch.expm1((-alpha * logratio).clamp(max=EXP_CLAMP)) / alpha


def log_odds(mean_logp: Tensor) -> Tensor:
    """phi = x - log(1 - exp(x)) of a mean log-probability x <= 0, capped at x = -1e-6.

    log(1 - e^x) is formed as log(-expm1(x)): exact near 0, and where e^x is small its error is one
    rounding of a number near 1, below that of x itself.
    """
    x = mean_logp.clamp(max=-LOGP_EPS)
    return x - torch.log(-torch.expm1(x))


def exo(margin: Tensor, label_smoothing: float) -> Tensor:
    """l = S(m) (log S(m) - log(1 - eps)) + S(-m) (log S(-m) - log eps), eps in (0, 0.5].

    The KL from the model's preference to the smoothed label; l' = S(m) S(-m) (m -
    log((1-eps)/eps)).
    """
    if not 0.0 < label_smoothing <= 0.5:
        raise ValueError(
            f"label_smoothing must be in (0, 0.5], got {label_smoothing}; 0 makes this loss "
            "infinite."
        )
    win, lose = math.log1p(-label_smoothing), math.log(label_smoothing)
    return torch.sigmoid(margin) * (logsigmoid(margin) - win) + torch.sigmoid(-margin) * (
        logsigmoid(-margin) - lose
    )


def clipped_gain(logratio: Tensor, advantage: Tensor, eps: float) -> Tensor:
    """l = -min(r A, clip(r, 1 - eps, 1 + eps) A), r = exp(a); exponent capped at 80.

    l' = -r A where A > 0 and r < 1 + eps, or A < 0 and r > 1 - eps; else 0.
    """
    ratio = torch.exp(logratio.clamp(max=EXP_CLAMP))
    clipped = (advantage > 0) & (ratio >= 1.0 + eps) | (advantage < 0) & (ratio <= 1.0 - eps)
    held = ratio.detach().clamp(1.0 - eps, 1.0 + eps)
    return -torch.where(clipped, held, ratio) * advantage


def kl_estimate(logratio: Tensor, estimator: str) -> Tensor:
    """k1 = a, k2 = a^2 / 2, k3 = e^-a - 1 + a (exponent capped at 80), a = log policy / other.

    They estimate KL(policy || other) for tokens drawn from the policy. As losses, k2 alone has the
    gradient of that KL in expectation; k3 has that of KL(other || policy), k1 has none.
    """
    if estimator == "k1":
        return logratio
    if estimator == "k2":
        return 0.5 * logratio * logratio
    if estimator != "k3":
        raise ValueError(f"the KL estimator must be one of ('k1', 'k2', 'k3'), got {estimator!r}.")
    x = (-logratio).clamp(max=EXP_CLAMP)
    return torch.expm1(x) - x


def log_ratio_modulated(margin: Tensor, tau: float) -> Tensor:
    """l = softplus(-m) S(-m / tau) + exp(log S(m / tau) - m); the merged exponents never overflow
    for tau <= 1, where exp(-m) S(m / tau) is inf * 0 at large negative m."""
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"tau must be in (0, 1], got {tau}; above 1 the loss grows exponentially.")
    gate = margin / tau
    return -logsigmoid(margin) * torch.sigmoid(-gate) + torch.exp(logsigmoid(gate) - margin)
