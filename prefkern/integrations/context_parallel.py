"""Sequences whose tokens lie on several ranks: sums over a sequence become sums over ranks too.

Token statistics are local to the rank that holds the tokens. Pass targets that were shifted before
the sequence was split (`shift_labels`), since the label of a rank's last token is on the next one.

Shapes: S sequences, K statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..stats import SeqStats

GRADIENTS = ("mean", "sum")


def reduce_sequences(seq: SeqStats, group: Any = None, *, gradients: str = "mean") -> SeqStats:
    """The statistics of whole sequences, the same on every rank of `group`: one all-reduce of
    [K, S] numbers, whatever the length of a sequence is.

    Every rank then computes the same loss, so what reaches a rank's tokens is what it alone
    contributes. The right gradient of a weight is the sum over the ranks.

    Args:
        seq: Sums over this rank's part of each sequence (`objective.segments.sequence_stats`), the
            same sequences in the same order on every rank, with the same fields.
        group: The context parallel group. Default None, all ranks.
        gradients: What becomes of the ranks' gradients: "mean" where they are averaged, as DDP and
            FSDP do over a mesh that holds the group, "sum" where they are added. Default "mean".

    Returns:
        SeqStats, each field `[S]`.

    Raises:
        ValueError: an unknown `gradients`, torch.distributed not initialised.
    """
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients must be one of {GRADIENTS}, got {gradients!r}.")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "reduce_sequences needs the ranks that share the sequences, got a single process; call "
            "torch.distributed.init_process_group first, or leave it out."
        )
    fields = {name: value for name, value in seq._asdict().items() if value is not None}
    scale = torch.distributed.get_world_size(group) if gradients == "mean" else 1
    total = _SumOverRanks.apply(torch.stack(list(fields.values())), group, scale)
    return SeqStats(**dict(zip(fields, total.unbind(0), strict=True)))


class _SumOverRanks(torch.autograd.Function):
    """Forward: the sum over ranks. Backward: the gradient of the common loss, times `scale`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any, scale: int) -> Tensor:  # [K, S]
        ctx.scale = scale
        total = part.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.scale, None, None
