"""beta-DPO: beta follows the batch's mean margin, and outlying pairs are left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core, links
from ..record import Loss


class BetaState(NamedTuple):
    """Moving averages of the batch's mean and standard deviation of margins, in nats."""

    mean: float = 0.0
    std: float = 0.0


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
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `ref_logp`.
        keep: `[P]` bool or 0/1, pairs that count; see `select`.
        gap_mean: Moving average of the mean margin before this batch, default 0; see `update`.
        beta: Base strength, > 0, default 0.1.
        a: How strongly beta follows the margin, default 0.6.
        ema: Momentum of the moving average in [0, 1), default 0.9.

    Returns:
        Unreduced loss `[P]`, 0 where not kept. Its mean runs over the kept pairs: divide the sum by
        max(1, keep.sum()).

    Raises:
        ValueError: beta <= 0, ema outside [0, 1), keep is not `[P]`, shapes that differ.
    """
    core.positive("beta", beta)
    if not 0.0 <= ema < 1.0:
        raise ValueError(f"ema must be in [0, 1), got {ema}.")
    gap = core.logratio_gap(chosen, rejected)
    kept = core.data("keep", keep, gap)
    strength = batch_beta(gap, kept, gap_mean, beta=beta, a=a, ema=ema)
    return torch.where(kept > 0, kept * links.logistic(strength * gap), 0.0)


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


BETA_DPO = Loss(
    beta_dpo,
    "beta_dpo",
    "pairwise",
    needs_reference=True,
    extra=("keep",),
    status="checked against the authors' code",
    source="arXiv 2407.08639",
    rewards=core.logratio_rewards,
    update=update,
)
