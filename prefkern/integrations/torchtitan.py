"""A preference loss for torchtitan, whose chunked loss wrapper owns the head.

    from prefkern.integrations.torchtitan import loss_class
    PreferenceLoss = loss_class()
    config.loss = PreferenceLoss.Config(loss="simpo")

Read: 0.3.0. torchtitan's wrapper runs a backward per chunk, so a loss that couples the tokens of a
pair has no place in it; here the head is called once, as a module, so FSDP2 gathers and reduces it.
Rows are sequences, chosen and rejected neighbours; where torchtitan hands over one row without a
batch axis, sequences begin where `positions` are 0. Labels are shifted already. torchtitan adds
gradients over data parallel ranks: `ranks` divides the mean over a rank's pairs.

Shapes: B rows of T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..head import Head
from ..objective.preference_loss import preference_loss
from ..shard import is_distributed
from . import signatures
from .output_layer import replaced

TESTED = "torchtitan 0.3.0"
WRAPPER = "torchtitan.components.loss:ChunkedLossWrapper"
_CALL = ("self", "pred", "labels", "global_valid_tokens", "loss_inputs")


def loss_class(base: Any = None) -> Any:
    """A subclass of torchtitan's ChunkedLossWrapper (default) or of `base`.

    Raises:
        ImportError: torchtitan is absent, or its wrapper is not the one that was read.
    """
    if base is None:
        base = signatures.imported(WRAPPER, TESTED)
    signatures.check(base.__call__, _CALL, TESTED)
    signatures.check(base.set_lm_head, ("self", "lm_head"), TESTED)
    outer: Any = base

    class PreferenceLoss(outer):
        @dataclass(kw_only=True, slots=True)
        class Config(outer.Config):
            loss: str = "simpo"
            loss_args: Mapping[str, Any] = field(default_factory=dict)
            ranks: int = 1
            """Data parallel ranks, whose gradients torchtitan adds."""

        def __init__(self, config: Any, *, compile_config: Any = None) -> None:
            super().__init__(config, compile_config=compile_config)
            self.loss, self.loss_args = config.loss, dict(config.loss_args)
            self.ranks = config.ranks

        def __call__(
            self,
            pred: Tensor,  # [B, T, D] or [N, D]
            labels: Tensor,  # [B, T] or [N]
            global_valid_tokens: Tensor | None = None,
            **loss_inputs: Any,
        ) -> tuple[Tensor, dict[str, Tensor]]:
            """(loss, metrics). `loss_inputs`: what the loss reads beside the policy (ref_logp,
            ref_seq_logp, item_weights ...); `positions` [N] bound the sequences of one row."""
            head = self.lm_head
            if head is None:
                raise ValueError("set_lm_head must be called before the loss.")
            if is_distributed(pred):
                raise ValueError(
                    "hidden states came as a DTensor (tensor or context parallel); this loss runs "
                    "under data parallelism."
                )
            given = {k: v for k, v in loss_inputs.items() if k != "positions"}
            if labels.dim() == 1:
                given["cu_seqlens"] = _boundaries(labels, loss_inputs.get("positions"))

            def compute(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                own = Head(head.weight, getattr(head, "bias", None))
                return preference_loss(
                    hidden, own, labels, loss=self.loss, **{**self.loss_args, **given}
                )

            with replaced(head, compute):
                loss, metrics = head(pred)
            return loss / self.ranks, metrics

    return PreferenceLoss


def _boundaries(labels: Tensor, positions: Tensor | None) -> Tensor:  # [S+1]
    if positions is None or positions.shape != labels.shape:
        got = None if positions is None else list(positions.shape)
        raise ValueError(
            f"labels are one row [{len(labels)}] of several sequences, and positions say where "
            f"they begin; they must come with the loss in the same shape, got {got}."
        )
    starts = (positions == 0).nonzero().flatten()
    end = starts.new_tensor([len(labels)])
    return torch.cat([starts, end]).int()
