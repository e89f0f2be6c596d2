"""Labels of samples from rewards: how likely one wins, how often it does.

Shapes: P pairs, S samples, M reward models, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..ops import ragged


def win_probability(
    chosen: Tensor,  # [P]
    rejected: Tensor,  # [P]
    *,
    low: float,
    high: float,
) -> Tensor:  # [P]
    """SmPO-Diffusion's p_win (arXiv 2506.02698): a softmax over the two rewards, each scaled so
    that the data set's range low ... high becomes 0 ... 1.

    Raises:
        ValueError: rewards of different shape, a range that is empty.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"chosen and rejected must both be [P], got {list(chosen.shape)} and "
            f"{list(rejected.shape)}."
        )
    if not low < high:
        raise ValueError(f"low must be below high (the data set's range), got {low} and {high}.")
    return torch.sigmoid((chosen - rejected) / (high - low))


def win_share(rewards: Tensor, cu_groups: Tensor) -> Tensor:  # [S, M], [G+1] -> [S]
    """RankDPO's phi (arXiv 2410.18013): the share of comparisons that a sample wins against the
    others of its group under M reward models; a tie is half a win.

    Raises:
        ValueError: rewards that are not [S, M] or not finite, boundaries that do not fit.
    """
    checks.check_float("rewards", rewards)
    if rewards.dim() != 2:
        raise ValueError(
            f"rewards must be [S, M], one column per reward model, got {list(rewards.shape)}."
        )
    if not bool(rewards.isfinite().all()):
        raise ValueError("rewards must be finite; drop samples that could not be scored.")
    checks.check_cu_seqlens(cu_groups, len(rewards), name="cu_groups", of="samples")
    group = ragged.owner(cu_groups, len(rewards))
    mates = (group[:, None] == group[None]).fill_diagonal_(False)  # [S, S]
    won = 0.5 * (1.0 + (rewards[:, None] - rewards[None]).sign()).mean(-1)
    return (won * mates).sum(1) / mates.sum(1).clamp(min=1)
