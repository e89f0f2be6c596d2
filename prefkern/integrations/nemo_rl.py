"""Prefkern's pair losses as NeMo-RL loss functions.

    from prefkern.integrations.nemo_rl import PreferenceLossFn
    loss_fn = PreferenceLossFn("apo_zero", beta=0.1)     # in place of DPOLossFn

Read: the repository at 7ea279a (nemo_rl/algorithms/loss). Log-probabilities come from NeMo-RL, so
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
from .head_view import IGNORE

TESTED = "NeMo-RL at 7ea279a"
_INTERFACES = "nemo_rl.algorithms.loss.interfaces"
_READS = {"logp", "ref_logp", "length"}
# What NeMo-RL's validation asks for -> ours; rewards are times beta here.
_METRICS = {
    "accuracy": "rewards/accuracies", "rewards_chosen_mean": "rewards/chosen",
    "rewards_rejected_mean": "rewards/rejected",
}  # fmt: skip


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
    def metric_normalizations(self) -> dict[str, Any]:
        """By what NeMo-RL undoes a placeholder normalization; metrics not named go by pairs."""
        kinds = signatures.imported(f"{_INTERFACES}:MetricNormalizer", TESTED)
        return {"loss": kinds.SEQUENCES, "num_valid_samples": kinds.NONE}

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
        rows = data["sample_mask"].bool()  # [B], the same for both of a pair
        pairs = rows.sum() / 2
        if not bool(rows.any()):
            loss = next_token_logprobs.sum() * 0.0
            names = ("loss", "preference_loss", "sft_loss", "num_valid_samples", *_METRICS)
            return loss, dict.fromkeys(names, 0.0)
        scored = data["token_mask"][rows, 1:].bool()
        logp = next_token_logprobs[rows]
        targets = torch.zeros_like(scored, dtype=torch.int64).masked_fill(~scored, IGNORE)
        zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
        reference = None
        if self.reference:
            given = data["reference_policy_logprobs"][rows, :-1].to(logp)
            reference = torch.where(scored, given, zero)
        tokens = TokenStats(logp=torch.where(scored, logp, zero), ref_logp=reference)
        loss, metrics = loss_from_stats(
            tokens, targets, loss=self.loss, num_items={"pairs": global_valid_seqs / 2},
            **self.loss_args,
        )  # fmt: skip
        # NeMo-RL adds metrics over micro-batches and ranks: each is this one's share of the mean
        share = pairs * 2 / global_valid_seqs
        found = {name: (value * share).item() for name, value in metrics.items()}
        found |= {theirs: found[ours] for theirs, ours in _METRICS.items()}
        found |= {"loss": loss.item(), "preference_loss": loss.item(), "sft_loss": 0.0}
        return loss, found | {"num_valid_samples": pairs.item()}
