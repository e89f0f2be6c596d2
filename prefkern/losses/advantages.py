"""Advantages and token rewards for the policy-gradient losses; constants, no gradient.

Shapes: N packed tokens, S sequences, G groups, R reward components. `scored` [N] is True where a
token belongs to a response; everything is 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import ragged

MODES = ("sum_then_normalize", "normalize_then_sum")
SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: Tensor,  # [S] or [S, R]
    cu_groups: Tensor,  # [G+1]
    *,
    weights: Sequence[float] | None = None,
    mode: str = "sum_then_normalize",
    scale: str = "group",
    unbiased: bool = True,
    std_eps: float = 1e-4,
) -> Tensor:  # [S]
    """Group-relative advantages of several objectives.

    sum_then_normalize:  R = sum_k w_k r_k,  A = (R - mean_g R) / (std_g R + eps)
    normalize_then_sum:  c = sum_k w_k (r_k - mean_g r_k) / (std_g r_k + eps),
                         A = (c - mean c) / (std c + eps) over the batch

    As in TRL's GRPO trainer (scale, multi-objective aggregation).

    Args:
        rewards: `[S]` or `[S, R]` components; NaN is a missing reward, left out of sums and
            statistics.
        cu_groups: `[G+1]` boundaries of the responses to one prompt.
        weights: R factors, default None (all 1).
        mode: "sum_then_normalize" or "normalize_then_sum", default "sum_then_normalize".
        scale: Divisor of sum_then_normalize, the standard deviation of the "group", of the "batch",
            or "none" (Dr. GRPO); default "group".
        unbiased: Divides by n - 1, default True.
        std_eps: Added to the standard deviation, default 1e-4.

    Returns:
        `[S]` in the dtype of rewards; 0 for a response without any reward, in groups of one and in
        groups without variance.

    Raises:
        ValueError: an unknown mode or scale, weights that do not fit, shapes that do not fit.
    """
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards must be [S] or [S, R], got {list(rewards.shape)}.")
    if mode not in MODES or scale not in SCALES:
        raise ValueError(f"mode must be one of {MODES} and scale one of {SCALES}.")
    value = rewards.detach().double().reshape(len(rewards), -1)  # [S, R]
    if weights is None:
        weights = [1.0] * value.shape[1]
    if len(weights) != value.shape[1]:
        raise ValueError(f"weights must have one number per component ({value.shape[1]}).")
    factor = torch.tensor(weights, dtype=torch.float64, device=value.device)
    group = ragged.owner(cu_groups, len(value))
    one = torch.zeros_like(group)
    if mode == "normalize_then_sum":
        parts = [_standard(column, group, unbiased, std_eps) for column in value.unbind(1)]
        value = torch.stack(parts, 1)
    present = ~value.isnan()
    total = torch.where(present, value, 0.0) @ factor
    total = torch.where(present.any(1), total, torch.nan)
    if mode == "normalize_then_sum":
        result = _standard(total, one, unbiased, std_eps)
    elif scale == "group":
        result = _standard(total, group, unbiased, std_eps)
    else:
        result = total - _moments(total, group, unbiased)[0][group]
        if scale == "batch":
            result = result / (_moments(total, one, unbiased)[1][0] + std_eps)
    return torch.where(result.isnan(), 0.0, result).to(rewards.dtype)


def _moments(x: Tensor, group: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the numbers of each group; 0 where there are none."""
    there = ~x.isnan()
    size = torch.zeros_like(x).index_add(0, group, there.double())
    mean = torch.zeros_like(x).index_add(0, group, torch.where(there, x, 0.0)) / size.clamp(min=1)
    off = torch.where(there, x - mean[group], 0.0)
    square = torch.zeros_like(x).index_add(0, group, off * off)
    return mean, (square / (size - float(unbiased)).clamp(min=1)).sqrt()


def _standard(x: Tensor, group: Tensor, unbiased: bool, eps: float) -> Tensor:
    mean, std = _moments(x, group, unbiased)
    return (x - mean[group]) / (std[group] + eps)


def rto_rewards(
    dpo_logp: Tensor,  # [N]
    ref_logp: Tensor,  # [N]
    old_logp: Tensor,  # [N]
    sequence_reward: Tensor,  # [S]
    cu_seqlens: Tensor,  # [S+1]
    scored: Tensor,  # [N]
    *,
    beta1: float = 0.05,
    beta2: float = 0.01,
    beta3: float = 1.0,
    dpo_reward_clip: float = 0.0,
) -> Tensor:  # [N]
    """Token rewards of RTO: a DPO-trained model's log-ratio, a KL penalty, a score at the end.

    R_t = clip(beta1 (dpo_logp - ref_logp)) - beta2 (old_logp - ref_logp)
          + [t is the last token] beta3 clip(sequence_reward, -10, 10)

    Zhong et al. 2024 (arXiv 2404.18922), eq. 4.5-4.7; the per-token clip is in the code only.

    Args:
        dpo_logp, ref_logp, old_logp: `[N]` log-probability of each sampled token under the
            DPO-trained model, the reference and the policy that sampled.
        sequence_reward: `[S]` normalised score of the whole response.
        cu_seqlens: `[S+1]` boundaries of the sequences.
        scored: `[N]` bool, tokens of the response.
        beta1: Weight of the DPO reward, default 0.05.
        beta2: Weight of the KL penalty (k1), default 0.01.
        beta3: Weight of the score, default 1.
        dpo_reward_clip: Bound of the DPO reward per token (0.05 in the authors' script), default 0,
            no clip.

    Returns:
        `[N]`, 0 outside responses.
    """
    dense = beta1 * (dpo_logp - ref_logp)
    if dpo_reward_clip > 0:
        dense = dense.clamp(-dpo_reward_clip, dpo_reward_clip)
    reward = dense - beta2 * (old_logp - ref_logp)
    owner = ragged.owner(cu_seqlens, scored.numel())
    position = torch.arange(scored.numel(), device=scored.device)
    last = position.new_full((cu_seqlens.numel() - 1,), -1)
    last = last.scatter_reduce(0, owner, torch.where(scored, position, -1), "amax")
    final = beta3 * sequence_reward.to(reward.dtype).clamp(-10.0, 10.0)[owner]
    reward = reward + torch.where(position == last[owner], final, 0.0)
    return torch.where(scored, reward, 0.0).detach()


def gae(
    rewards: Tensor,  # [N]
    values: Tensor,  # [N]
    cu_seqlens: Tensor,  # [S+1]
    scored: Tensor,  # [N]
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:  # [N], [N]
    """Generalised advantage estimation over the scored tokens of each sequence.

    d_t = R_t + gamma V_{t+1} - V_t,  A_t = d_t + gamma lam A_{t+1},  returns A_t + V_t,
    where t + 1 is the next scored token of the same sequence (V = A = 0 after the last)

    Schulman et al. 2015 (arXiv 1506.02438).

    Args:
        rewards: `[N]` reward of each token.
        values: `[N]` value at the state before each token.
        cu_seqlens: `[S+1]` boundaries of the sequences.
        scored: `[N]` bool, tokens of the response.
        gamma: Discount, default 1.
        lam: Trace decay, default 0.95.

    Returns:
        (advantages `[N]`, returns `[N]`), 0 outside responses, without gradient.
    """
    rows = scored.nonzero()[:, 0]
    owner = ragged.owner(cu_seqlens, scored.numel())[rows]
    reward, value = rewards.detach().double()[rows], values.detach().double()[rows]

    def ahead(x: Tensor, step: int) -> Tensor:
        """x of the token `step` places later in the same sequence, 0 where there is none."""
        moved = torch.zeros_like(x)
        if step < x.numel():
            same = owner[step:] == owner[:-step]
            moved[:-step] = torch.where(same, x[step:], 0.0)
        return moved

    total = reward + gamma * ahead(value, 1) - value
    # After the pass of width w a token holds its next 2 w terms: log2(longest) passes, no loop
    # over tokens.
    width, decay = 1, gamma * lam
    longest = int(torch.bincount(owner).max()) if owner.numel() else 0
    while width < longest:
        total = total + decay**width * ahead(total, width)
        width *= 2
    advantage, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    advantage[rows] = total.to(rewards.dtype)
    returns[rows] = (total + value).to(rewards.dtype)
    return advantage, returns


def whiten(advantages: Tensor, scored: Tensor, *, eps: float = 1e-8) -> Tensor:  # [N]
    """Advantages with mean 0 and variance 1 over all scored tokens of a buffer; 0 elsewhere."""
    zero = torch.zeros_like(scored, dtype=torch.int64)
    x = torch.where(scored, advantages.detach().double(), torch.nan)
    mean, std = _moments(x, zero, True)
    return torch.where(scored, (x - mean[0]) / (std[0] + eps), 0.0).to(advantages.dtype)
