"""Metrics of prefkern's losses over ranks and into TRL's log.

TRL logs means over pairs and means over tokens. Ranks hold as many pairs each, but not as many
tokens, so a mean over tokens is weighed by them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Means over scored tokens -> whose tokens.
_OVER_TOKENS = {
    "entropy": "all", "logits/mean": "all", "logits/chosen": "chosen",
    "logits/rejected": "rejected", "mean_token_accuracy": "chosen",
}  # fmt: skip


def over_ranks(
    accelerator: Any, metrics: dict[str, Tensor], counts: dict[str, Tensor]
) -> dict[str, float]:
    """Metrics of this rank's batch (0-d tensors) -> those of the batch of all ranks, by one gather.

    `counts`: scored tokens of "all" answers, of "chosen" and of "rejected" ones (0-d).
    """
    names = list(metrics)
    if not names:
        return {}
    device = accelerator.device
    ones = torch.ones((), dtype=torch.float64, device=device)
    weights = [
        counts[_OVER_TOKENS[n]].to(ones) if n in _OVER_TOKENS and n in metrics else ones
        for n in names
    ]
    values = [metrics[n].to(ones) for n in names]
    rows = torch.stack([torch.stack(values), torch.stack(weights)])[None]  # [1, 2, K]
    every = accelerator.gather(rows)
    value, weight = every[:, 0], every[:, 1]
    means = (value * weight).sum(0) / weight.sum(0).clamp(min=1)
    return dict(zip(names, means.tolist(), strict=True))


def token_counts(targets: Tensor, chosen: Tensor | None, ignore: int) -> dict[str, Tensor]:
    """Scored tokens by side; `chosen` [S] bool, None where answers have no side."""
    scored = (targets != ignore).sum(1)  # [S]
    if chosen is None:
        return dict.fromkeys(("all", "chosen", "rejected"), scored.sum())
    at = chosen.to(scored.device)
    return {"all": scored.sum(), "chosen": scored[at].sum(), "rejected": scored[~at].sum()}
