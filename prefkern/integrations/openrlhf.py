"""OpenRLHF's Actor without logits: its DPO, KTO and PPO losses on prefkern's log-probabilities.

    from prefkern.integrations import openrlhf
    Actor = openrlhf.actor_class()       # in place of openrlhf.models.Actor

Read: 0.11.2. Positions whose label is padding hold 0 instead of a number that no loss of OpenRLHF
reads. A call for logits (return_output without log-probabilities) is OpenRLHF's own.

Shapes: B rows of T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.linear_stats import linear_logps
from ..stats import TokenStats
from . import signatures
from .head import ensure_head
from .head_view import IGNORE, View

TESTED = "openrlhf 0.11.2"
_FORWARD = (
    "self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits",
    "return_logprobs", "ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs",
)  # fmt: skip
_PACKING = "openrlhf.models.ring_attn_utils"


class HeadOutput(dict[str, Any]):
    """What stands for the model's output: aux_loss and entropy, no logits."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{name}: the model was run without logits") from None


def actor_class(base: Any = None) -> Any:
    """`base` (default openrlhf.models.Actor) with log-probabilities from the head.

    Raises:
        ImportError: its forward is not the one that was read.
    """
    if base is None:
        base = signatures.imported("openrlhf.models:Actor", TESTED)
    signatures.check(base.forward, _FORWARD, TESTED)

    class PrefkernActor(base):
        def forward(
            self,
            sequences: Tensor,
            action_mask: Tensor | None = None,
            attention_mask: Tensor | None = None,
            return_output: bool = False,
            allgather_logits: bool = False,
            return_logprobs: bool = False,
            ring_attn_group: Any = None,
            packed_seq_lens: list[int] | None = None,
            return_entropy: bool = False,
            **mm_inputs: Any,
        ) -> Any:
            if (action_mask is None and not return_logprobs) or getattr(self, "is_vlm", False):
                return super().forward(
                    sequences, action_mask, attention_mask, return_output, allgather_logits,
                    return_logprobs, ring_attn_group, packed_seq_lens, return_entropy, **mm_inputs,
                )  # fmt: skip
            if return_entropy and not return_output:
                raise ValueError("return_entropy=True stands in the output: set return_output.")
            ensure_head(self.model)
            assert attention_mask is not None
            inputs, targets, restore = _inputs(self, sequences, attention_mask, ring_attn_group)

            def compute(view: View) -> TokenStats:
                head = replace(view.head, temperature=self.temperature)
                stats = ("logp", "ent") if return_entropy else ("logp",)
                return linear_logps(view.hidden, head, targets.to(view.hidden.device), stats=stats)

            out = self.model(**inputs, **mm_inputs, at_head=compute)
            logps = restore(out.value.logp)[:, :-1]
            output = HeadOutput() if out.aux_loss is None else HeadOutput(aux_loss=out.aux_loss)
            if return_entropy:
                output["entropy"] = restore(out.value.ent)[:, :-1]
            if action_mask is not None:
                logps = logps[:, -action_mask.shape[1] :] * action_mask.float()
            return (logps, output) if return_output else logps

    return PrefkernActor


def _inputs(actor: Any, sequences: Tensor, mask: Tensor, group: Any) -> tuple[Any, Tensor, Any]:
    """(arguments of the model, targets, what puts [1, N] values back to [B, T])."""
    if not actor.packing_samples:
        positions = mask.long().cumsum(-1) - 1
        positions.masked_fill_(mask == 0, 1)
        targets = torch.roll(sequences, shifts=-1, dims=1)
        labelled = torch.roll(mask, shifts=-1, dims=1).bool()
        labelled[:, -1] = False
        plain = {"input_ids": sequences, "attention_mask": mask, "position_ids": positions}
        return plain, targets.masked_fill(~labelled, IGNORE), lambda x: x
    unpad = signatures.imported(f"{_PACKING}:unpad_and_slice_tensor", TESTED)
    pad = signatures.imported(f"{_PACKING}:gather_and_pad_tensor", TESTED)
    batch, width = sequences.shape
    packed, positions, targets, pad_len, indices = unpad(sequences, mask, group)
    inputs = {"input_ids": packed, "attention_mask": None, "position_ids": positions}

    def restore(value: Tensor) -> Tensor:
        found: Tensor = pad(value, group, pad_len, indices, batch, width)
        return found

    return inputs, targets, restore
