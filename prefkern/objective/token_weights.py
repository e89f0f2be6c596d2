"""The weight that a loss gives to each statistic of each token, for a reader's eyes.

Shapes: N tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..losses.binding import LossLike
from ..stats import TokenStats
from . import segments
from .given import checked_weights
from .terms import Objective, bind_terms, weight_stage


def stage_weights(
    tokens: TokenStats,  # each field like targets
    targets: Tensor,  # [N] or [B, T]
    cu_seqlens: Tensor | None = None,  # [S+1]
    *,
    loss: LossLike | Sequence[LossLike] = "dpo",
    layout: str = "pairs",
    token_weights: Tensor | Mapping[str, Tensor] | None = None,
    ignore_index: int = -100,
    **loss_args: Any,
) -> dict[str, Tensor]:  # each [N]
    """Statistic -> its weights under the first loss, the caller's own multiplied in.

    Args:
        tokens: Token statistics; `logp` and, where the stage reads it, `ref_logp`.
        targets, cu_seqlens, loss, layout, token_weights, ignore_index: As in `loss_from_stats`.
        **loss_args: What the losses require, masks and guiding log-probabilities among it.

    Returns:
        A tensor `[N]` for every statistic that the loss reads and that is weighted, one and the
        same where all are weighted alike; a statistic without one has weight 1. "logp" stands for
        the log-ratio.

    Raises:
        ValueError: as `loss_from_stats`.
    """
    cu_seqlens = segments.sequence_boundaries(targets, cu_seqlens)
    flat = {
        name: value.reshape(-1)
        if isinstance(value, Tensor) and value.dim() == 2 and value.shape == targets.shape
        else value
        for name, value in loss_args.items()
    }
    term = bind_terms(loss, None, flat, stateful=True)[0]
    objective = Objective(
        tokens, targets, cu_seqlens, layout, None, None, None, ignore_index, None, None, None
    )
    stage = weight_stage(term, objective)
    read = dict.fromkeys(("logp", *(stat.partition(":")[0] for stat in term.call.stats)))
    user = checked_weights(token_weights, targets.shape, frozenset(read))
    there = tuple(name for name in read if name != "ref_logp" and getattr(tokens, name) is not None)
    found = segments.combine_weights(stage, user, there)
    flattened = {id(weight): weight.detach().reshape(-1) for weight in found.values()}
    return {name: flattened[id(weight)] for name, weight in found.items()}
