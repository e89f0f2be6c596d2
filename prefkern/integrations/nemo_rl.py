"""Prefkern's pair losses as NeMo-RL loss functions.

    from prefkern.integrations.nemo_rl import PreferenceLossFn
    loss_fn = PreferenceLossFn("apo_zero", beta=0.1)     # in place of DPOLossFn

Read: the repository at 006907a (nemo_rl/algorithms/loss). Log-probabilities come from NeMo-RL, so
losses that read a divergence are refused.

Shapes: B rows of T tokens, chosen and rejected neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..objective.preference_loss import loss_from_stats
from ..stats import TokenStats
from . import signatures
from .head import IGNORE

TESTED = "NeMo-RL at 006907a"
_INTERFACES = "nemo_rl.algorithms.loss.interfaces"
_READS = {"logp", "ref_logp", "length"}


class PreferenceLossFn:
    """NeMo-RL's protocol of a loss on log-probabilities, summed over pairs and divided by the pairs
    of the whole batch; samples with sample_mask 0 count nothing.

    Args:
        loss: A pairwise loss that reads log-probabilities, of policy and reference.
        use_fused_linear_logprobs: NeMo-RL forms log-probabilities from hidden states. Default off.
        **loss_args: The loss's own.

    Raises:
        ValueError: an unknown loss or argument, a loss that reads something else.
        ImportError: NeMo-RL is absent, when its enumerations are read.
    """

    def __init__(
        self, loss: str = "dpo", *, use_fused_linear_logprobs: bool = False, **loss_args: Any
    ) -> None:
        record, fixed = losses.resolve(loss)
        call = losses.bind(record, {**fixed, **loss_args})
        stats = {stat.partition(":")[0] for stat in call.stats}
        if record.family != "pairwise" or record.rows[2:] or stats - _READS:
            raise ValueError(
                f"loss {loss!r} reads more than the log-probabilities of pairs, which is what "
                "NeMo-RL hands over; call prefkern.preference_loss."
            )
        self.loss, self.loss_args, self.reference = loss, loss_args, call.needs_reference
        self.use_fused_linear_logprobs = use_fused_linear_logprobs

    @property
    def loss_type(self) -> Any:
        return signatures.imported(f"{_INTERFACES}:LossType", TESTED).SEQUENCE_LEVEL

    @property
    def input_type(self) -> Any:
        return signatures.imported(f"{_INTERFACES}:LossInputType", TESTED).LOGPROB

    def __call__(
        self,
        next_token_logprobs: Tensor,  # [B, T - 1]
        data: Mapping[str, Tensor],
        global_valid_seqs: Tensor,  # []
        global_valid_toks: Tensor | None = None,  # []
    ) -> tuple[Tensor, dict[str, Any]]:
        scored = data["token_mask"][:, 1:].bool()
        valid = data["sample_mask"][::2]  # [P]
        targets = torch.zeros_like(scored, dtype=torch.int64).masked_fill(~scored, IGNORE)
        zero = torch.zeros((), dtype=next_token_logprobs.dtype, device=next_token_logprobs.device)
        reference = None
        if self.reference:
            given = data["reference_policy_logprobs"][:, :-1].to(next_token_logprobs)
            reference = torch.where(scored, given, zero)
        tokens = TokenStats(logp=torch.where(scored, next_token_logprobs, zero), ref_logp=reference)
        loss, metrics = loss_from_stats(
            tokens, targets, loss=self.loss, item_weights=valid.to(torch.float32),
            num_items={"pairs": global_valid_seqs / 2}, **self.loss_args,
        )  # fmt: skip
        found = {name: value.item() for name, value in metrics.items()}
        return loss, {"loss": loss.item(), "num_valid_samples": valid.sum().item(), **found}
