"""The module that a run wraps: policy, learned modules and loss in one forward.

DistributedDataParallel synchronises gradients of parameters used inside the wrapped forward; a loss
computed outside it, on the unwrapped head, would let the ranks drift apart without an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..integrations import hf
from ..losses.record import Loss
from ..objective.preference_loss import preference_loss
from ..stats import SeqStats
from .config import TrainConfig
from .data import PreferenceBatch
from .models import autocast
from .providers import Micro, Provider
from .reference import ReferenceRows


class PreferenceStep(nn.Module):
    """forward(micro, reference, given, num_items) -> (loss, metrics).

    Its parameters are those of the policy and of what the providers train beside it.
    """

    def __init__(
        self,
        policy: nn.Module,
        config: TrainConfig,
        layout: str,
        providers: Sequence[Provider] = (),
    ) -> None:
        super().__init__()
        self.policy = policy
        self.config, self.layout, self.providers = config, layout, list(providers)
        self._beside = [name for p in providers for name in p.modules()]
        for provider in providers:
            for name, module in provider.modules().items():
                self.add_module(name, module)
        taken = frozenset[str]().union(*(provider.takes for provider in providers))
        self.loss_args = {k: v for k, v in config.loss_args.items() if k not in taken}

    def trained(self) -> dict[str, nn.Module]:
        """The modules a checkpoint holds."""
        return {"policy": self.policy} | {name: getattr(self, name) for name in self._beside}

    def forward(
        self,
        micro: Micro,
        reference: ReferenceRows,
        given: Mapping[str, Any],  # of the providers
        num_items: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch over the denominators `num_items`."""
        batch = micro.batch
        with autocast(self.config, batch.input_ids.device.type):
            hidden, _ = hf.hidden_states(
                self.policy,
                batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
            )
            loss, found = self._loss(hidden, micro, reference, given, num_items)
        for provider in self.providers:
            found |= provider.metrics()
        return loss, found

    def _loss(
        self,
        hidden: Tensor,  # [B, T, D]
        micro: Micro,
        reference: ReferenceRows,
        given: Mapping[str, Any],
        num_items: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch = micro.batch
        learned = {k: v for p in self.providers for k, v in p.learned(batch).items()}

        def from_statistics(
            record: Loss, rows: list[SeqStats], hyper: Mapping[str, Any]
        ) -> dict[str, Any]:
            return {
                name: value
                for provider in self.providers
                for name, value in provider.from_statistics(
                    record, rows, hyper, micro, self.training
                ).items()
            }

        return preference_loss(
            _packed(hidden, batch),
            hf.read_head(self.policy),
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
            relevance=batch.relevance,
            desirable=batch.desirable,
            token_weights=_packed(batch.token_weights, batch),
            item_weights=batch.weights,
            num_items=num_items,
            likelihood_targets=_packed(batch.likelihood_targets, batch),
            memory_budget=self.config.memory_budget,
            tail_mass=self.config.tail_mass,
            backend=self.config.backend,
            state_arguments=from_statistics,
            **{**self.loss_args, **given, **learned},
        )


def _packed(value: Any, batch: PreferenceBatch) -> Any:
    """A tensor (or None) [1, T, ...] -> [T, ...] for packed batches; else as it is, [B, T, ...]."""
    return value if value is None or batch.cu_seqlens is None else value.squeeze(0)
