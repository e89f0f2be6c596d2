"""The module that a run wraps: policy, learned modules and loss in one forward.

DistributedDataParallel synchronises gradients of parameters used inside the wrapped forward; a loss
computed outside it, on the unwrapped head, would let the ranks drift apart without an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..integrations import hf
from ..integrations.head_view import Compute
from ..integrations.loss_at_head import loss_at_head, with_router_loss
from ..losses.record import Loss
from ..stats import SeqStats
from .config import TrainConfig
from .forward import inputs_of
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
        with (
            autocast(self.config, batch.input_ids.device.type),
            inputs_of(self.policy, batch) as inputs,
        ):
            if getattr(hf.text_config(self.policy), "output_router_logits", False):
                inputs["output_router_logits"] = True
            objective = self._objective(micro, reference, given, num_items)
            out = self.policy(**inputs, at_head=objective)
        # the routers' loss is a mean over a batch; over a step it is the mean over its groups
        share = len(micro.examples) / num_items["groups"] if out.aux_loss is not None else 1.0
        loss, found = with_router_loss(self.policy, out, share=share)
        for provider in self.providers:
            found |= provider.metrics()
        return loss, found

    def _objective(
        self,
        micro: Micro,
        reference: ReferenceRows,
        given: Mapping[str, Any],
        num_items: Mapping[str, Any],
    ) -> Compute:
        """What runs at the policy's head: the loss of a micro-batch, and its metrics."""
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

        def from_states(hidden: Tensor) -> dict[str, Any]:
            found = (p.from_states(micro, hidden) for p in self.providers)
            return {name: value for given in found for name, value in given.items()}

        return loss_at_head(
            batch.targets,
            states=from_states,
            reference=reference.logp if reference.states is None else reference.states,
            cu_seqlens=batch.cu_seqlens,
            loss=list(self.config.loss),
            loss_weights=self.config.loss_weights and list(self.config.loss_weights),
            ref_seq_logp=reference.seq_logp,
            layout=self.layout,
            cu_groups=batch.cu_groups,
            relevance=batch.relevance,
            desirable=batch.desirable,
            token_weights=batch.token_weights,
            item_weights=batch.weights,
            num_items=num_items,
            likelihood_targets=batch.likelihood_targets,
            memory_budget=self.config.memory_budget,
            tail_mass=self.config.tail_mass,
            backend=self.config.backend,
            state_arguments=from_statistics,
            **{**self.loss_args, **given, **learned},
        )
