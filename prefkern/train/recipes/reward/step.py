"""The step of `--head reward`: a text's score stands where a loss reads its log-probability.

For a loss, every text is one token of log-probability r under the policy and 0 under the reference,
so that sum, mean and log-ratio of it are all r. S texts, n outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....objective.preference_loss import loss_from_stats
from ....stats import TokenStats
from ...data import PreferenceBatch
from ...models import autocast
from ...providers import Micro, Provider
from ...reference import ReferenceRows
from ...step import PreferenceStep
from .model import Outputs, outputs_of


class ScoreProvider(Provider):
    """A provider that reads the outputs of a reward model."""

    wants_features: ClassVar[bool] = False  # what the last layer reads
    makes_scores: ClassVar[bool] = False  # of the outputs, in place of their weighted sum

    def scores(self, outputs: Outputs, batch: PreferenceBatch) -> Tensor:
        """The score of every text [S]; of a provider that makes scores."""
        raise NotImplementedError

    def from_scores(
        self, outputs: Outputs, scores: Tensor, batch: PreferenceBatch
    ) -> dict[str, Any]:
        """Loss arguments that follow from the scores, constants."""
        return {}

    def penalty(self, batch: PreferenceBatch) -> Tensor | None:
        """A sum over the groups of the batch that is added to the loss over all groups."""
        return None


class RewardStep(PreferenceStep):
    """forward(micro, reference, given, num_items) -> (loss, metrics) of a reward model."""

    def forward(
        self,
        micro: Micro,
        reference: ReferenceRows,
        given: Mapping[str, Any],
        num_items: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch, own = micro.batch, [p for p in self.providers if isinstance(p, ScoreProvider)]
        with autocast(self.config, batch.input_ids.device.type):
            features = any(p.wants_features for p in own)
            outputs = outputs_of(self.policy, batch, features=features)
        scores = self._scores(outputs, batch)
        further = {k: v for p in own for k, v in p.from_scores(outputs, scores, batch).items()}
        loss, found = loss_from_stats(
            TokenStats(logp=scores, ref_logp=torch.zeros_like(scores)),
            torch.zeros_like(scores, dtype=torch.int64),
            torch.arange(len(scores) + 1, device=scores.device, dtype=torch.int32),
            loss=list(self.config.loss),
            loss_weights=self.config.loss_weights and list(self.config.loss_weights),
            layout=self.layout,
            cu_groups=batch.cu_groups,
            relevance=batch.relevance,
            item_weights=batch.weights,
            num_items=num_items,
            backend=self.config.backend,
            **{**self.loss_args, **given, **further},
        )
        for provider in own:
            if (extra := provider.penalty(batch)) is not None:
                extra = extra / num_items["groups"]
                loss, found["penalty"] = loss + extra, extra.detach()
        kept = {k: v for k, v in found.items() if not k.startswith(("logps/", "logits/"))}
        kept["rewards/mean"] = scores.detach().double().mean()
        for source in self.providers:
            kept |= source.metrics()
        return loss, kept

    def _scores(self, outputs: Outputs, batch: PreferenceBatch) -> Tensor:  # [S]
        for provider in self.providers:
            if isinstance(provider, ScoreProvider) and provider.makes_scores:
                return provider.scores(outputs, batch)
        weights = self.config.output_weights or (1.0,)
        return outputs.values @ outputs.values.new_tensor(weights)
