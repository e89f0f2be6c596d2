"""The module that a run wraps: policy, learned masks and loss in one forward.

DistributedDataParallel synchronises gradients of parameters used inside the wrapped forward; a loss
computed outside it, on the unwrapped head, would let the ranks drift apart without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations import hf
from ..losses.record import Loss
from ..losses.weights import SparseMasks
from ..objective.preference_loss import preference_loss
from ..stats import SeqStats
from . import masks as mask_module
from .config import TrainConfig
from .data import PreferenceBatch
from .data.extra import EITHER, KINDS, TOKEN
from .reference import ReferenceRows
from .states import LossStates


class PreferenceStep(nn.Module):
    """forward(batch, reference, num_items) -> (loss, metrics); parameters: policy and masks."""

    def __init__(
        self,
        policy: nn.Module,
        config: TrainConfig,
        layout: str,
        masks: SparseMasks | None = None,
        states: LossStates | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.masks = policy, masks
        self.config, self.layout = config, layout
        self.states = states or LossStates([], frozenset(), {}, config.seed)
        dropped = [*(mask_module.OPTIONS if masks is not None else ()), *self.states.options]
        self.loss_args = {k: v for k, v in config.loss_args.items() if k not in dropped}

    def trained(self) -> dict[str, nn.Module]:
        """The modules a checkpoint holds."""
        return {"policy": self.policy} | ({} if self.masks is None else {"masks": self.masks})

    def forward(
        self,
        batch: PreferenceBatch,
        reference: ReferenceRows,
        num_items: dict[str, Any],
        metrics: bool = True,
        real: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`real` is False for a batch that only keeps a rank in step with the others."""
        device = batch.input_ids.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.config.bf16):
            hidden, _ = hf.hidden_states(
                self.policy,
                batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
            )
            return self.loss(hidden, batch, reference, num_items, metrics, real)

    def loss(
        self,
        hidden: Tensor,  # [B, T, D]
        batch: PreferenceBatch,
        reference: ReferenceRows,
        num_items: dict[str, Any],
        metrics: bool,
        real: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        columns = dict(batch.values)
        names = columns.pop("annotator", None)
        for name, value in columns.items():
            if KINDS[name] in (TOKEN, EITHER):
                columns[name] = _packed(value, batch)
        arguments = self.loss_args | columns | reference.loss_args
        if reference.aux_head is not None:
            arguments["aux_hidden"] = _packed(reference.aux_hidden, batch)
            arguments["aux_head"] = reference.aux_head

        def state_arguments(
            record: Loss, rows: list[SeqStats], hyper: Mapping[str, Any]
        ) -> dict[str, Any]:
            return self.states.arguments(
                record, rows, hyper, names=names, training=self.training, real=real
            )

        scored = batch.targets.flatten() != -100  # [N]
        if self.masks is not None:
            assert reference.layers is not None
            arguments |= mask_module.arguments(self.masks, reference.layers, scored)
        head = hf.read_head(self.policy)
        loss, found = preference_loss(
            _packed(hidden, batch),
            head,
            _packed(batch.targets, batch),
            batch.cu_seqlens,
            loss=list(self.config.loss),
            loss_weights=self.config.loss_weights and list(self.config.loss_weights),
            ref_hidden=_packed(reference.hidden, batch),
            ref_head=reference.head,
            ref_logp=_packed(reference.logp, batch),
            ref_seq_logp=reference.seq_logp,
            layout=self.layout,
            cu_groups=batch.cu_groups,
            **_judgements(batch),
            token_weights=_packed(batch.token_weights, batch),
            item_weights=batch.weights,
            num_items=num_items,
            likelihood_targets=_packed(batch.likelihood_targets, batch),
            metrics=metrics,
            memory_budget=self.config.memory_budget,
            backend=self.config.backend,
            state_arguments=state_arguments,
            **arguments,
        )
        if metrics:
            found |= self.states.metrics
        if metrics and self.masks is not None:
            found |= mask_module.metrics(arguments, scored)
        return loss, found


def _judgements(batch: PreferenceBatch) -> dict[str, Any]:
    """Labels of the sequences [S] under the name the objective gives them."""
    unpaired = batch.labels is not None and batch.labels.dtype == torch.bool
    return {"desirable" if unpaired else "relevance": batch.labels}


def _packed(value: Any, batch: PreferenceBatch) -> Any:
    """[1, T, ...] -> [T, ...] for packed batches; padded ones stay [B, T, ...], others as well."""
    whole = value is None or batch.cu_seqlens is None or value.shape[:2] != batch.targets.shape
    return value if whole else value.squeeze(0)
