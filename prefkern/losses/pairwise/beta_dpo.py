"""beta-DPO: beta follows the batch's mean margin, and outlying pairs are left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..declare import pairwise


class BetaState(NamedTuple):
    """Moving averages of the batch's mean and standard deviation of margins, in nats."""

    mean: float = 0.0
    std: float = 0.0


def update(
    state: BetaState, chosen: SeqStats, rejected: SeqStats, *, ema: float = 0.9
) -> BetaState:
    """The state after this batch: moving averages of mean and (unbiased) deviation of its margins.

    A batch of one has no deviation and leaves that average as it is.
    """
    gap = core.logratio_gap(chosen, rejected).detach().double()
    if gap.numel() == 0:
        return state
    mean = ema * state.mean + (1.0 - ema) * gap.mean().item()
    if gap.numel() == 1:
        return BetaState(mean, state.std)
    return BetaState(mean, ema * state.std + (1.0 - ema) * gap.std().item())


@pairwise(
    source="arXiv 2407.08639",
    status="checked against the authors' code",
    reference=True,
    update=update,
)
def beta_dpo(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    keep: Tensor,  # [P]
    gap_mean: float | Tensor = 0.0,  # []
    beta: float = 0.1,
    a: float = 0.6,
    ema: float = 0.9,
) -> Tensor:  # [P]
    """beta-DPO: DPO with one beta per batch, larger where the kept margins exceed their average.

    l = keep softplus(-beta_b A),  A = logratio(chosen) - logratio(rejected),
    beta_b = max(1e-3, beta (1 + a (mean_kept(A) - M))),  M = ema gap_mean + (1 - ema) mean(A)

    Wu et al. 2024 (arXiv 2407.08639), as in the authors' code. beta_b is constant.

    Args:
        keep: `[P]` bool or 0/1, pairs that count: prefkern.losses.pairwise.beta_dpo.select(...).
        gap_mean: Moving average of the mean margin before this batch: the mean of the state that
            prefkern.losses.pairwise.beta_dpo.update gives.
        beta: Base strength, > 0.
        a: How strongly beta follows the margin.
        ema: Momentum of the moving average in [0, 1).

    Returns:
        Unreduced loss `[P]`, 0 where not kept. Its mean runs over the kept pairs: divide the sum by
        max(1, keep.sum()).
    """
    core.positive("beta", beta)
    if not 0.0 <= ema < 1.0:
        raise ValueError(f"ema must be in [0, 1), got {ema}.")
    gap = core.logratio_gap(chosen, rejected)
    kept = core.data("keep", keep, gap, flags=True)
    strength = batch_beta(gap, kept, gap_mean, beta=beta, a=a, ema=ema)
    return torch.where(kept <= 0, 0.0, kept * links.logistic(strength * gap))


def batch_beta(
    gap: Tensor,  # [P]
    kept: Tensor,  # [P]
    gap_mean: float | Tensor,
    *,
    beta: float = 0.1,
    a: float = 0.6,
    ema: float = 0.9,
) -> Tensor:  # []
    """The one beta of a batch with log-ratio margins `gap`, constant."""
    fixed = gap.detach()
    mean = ema * core.scalar("gap_mean", gap_mean, gap) + (1.0 - ema) * fixed.sum() / max(
        fixed.numel(), 1
    )
    kept_mean = (kept * fixed).sum() / kept.sum().clamp(min=1.0)
    return (beta * (1.0 + a * (kept_mean - mean))).clamp(min=1e-3)


def select(
    chosen: SeqStats,
    rejected: SeqStats,
    state: BetaState,
    *,
    rho: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:  # [P] bool
    """Draws the floor((1 - rho) P) pairs to keep, near-average margins being likelier.

    Drawn without replacement with probability proportional to exp(-((A - mean) / std)^2 / 2) under
    `state`, the averages of this batch included. Without a deviation, all are kept.
    """
    gap = core.logratio_gap(chosen, rejected).detach().double()
    if gap.numel() < 2 or not state.std > 0:
        return torch.ones_like(gap, dtype=torch.bool)
    wanted = int((1.0 - rho) * gap.numel())
    # Gumbel keys: the largest keys of log-weight plus noise are a draw without replacement, exact
    # also where the weights themselves underflow to 0.
    log_weight = -0.5 * ((gap - state.mean) / state.std) ** 2
    uniform = torch.rand(gap.shape, dtype=torch.float64, generator=generator, device=gap.device)
    key = log_weight - torch.log(-torch.log(uniform.clamp(min=1e-300)))
    keep = torch.zeros_like(gap, dtype=torch.bool)
    keep[key.topk(wanted).indices] = True
    return keep
