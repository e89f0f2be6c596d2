"""Two references: one for the best answers of a row and one for the others (D2O)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...integrations import hf
from ...losses.record import Loss
from ...objective.segments import sequence_boundaries
from ...ops import ragged
from ...ops.linear_stats import linear_logps
from ..config import TrainConfig
from ..data import PreferenceBatch
from ..demands import ReferenceNeeds
from ..providers import Micro, Opened, Provider
from ..reference import ReferenceRows, token_logps

# Whose sides are not compared within one reference.
LOSSES = ("d2o", "d2o_list")


class RejectedReference(Provider):
    """The reference's log-probabilities of all but the best answers, from a model of their own."""

    def __init__(self, config: TrainConfig, records: Sequence[Loss]) -> None:
        super().__init__(config, records)
        self.other: hf.Model = None

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return config.rejected_ref_model is not None

    def check(self) -> None:
        named = [record.name for record in self.records]
        needs = ReferenceNeeds.of(self.config)
        if not set(named) <= set(LOSSES) or needs.distribution:
            raise ValueError(
                f"rejected_ref_model: loss {', '.join(named)} compares both sides with one "
                f"reference; two are for {' and '.join(LOSSES)}."
            )
        if self.config.reference in ("columns", "none"):
            raise ValueError(
                "rejected_ref_model stands beside another reference per token; "
                f"reference={self.config.reference} gives none: use ref_model or precomputed_ref."
            )

    def open(self, opened: Opened) -> None:
        self.other = opened.frozen(str(self.config.rejected_ref_model))

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        """Nothing of its own: it replaces the part of `reference` that is of the other answers."""
        batch, states, logp = micro.batch, reference.states, reference.logp
        if states is not None:
            with states.gathered() as head:
                logp = linear_logps(
                    states.hidden, head, batch.targets, backend=self.config.backend
                ).logp
        assert logp is not None
        other = token_logps(self.other, batch, self.config)
        reference.logp = torch.where(worse_rows(batch).view_as(other), other, logp)
        reference.states = None
        return {}


def worse_rows(batch: PreferenceBatch) -> Tensor:  # [N] bool
    """True on the tokens of all answers but a row's best: the chosen one, or those of the highest
    label."""
    bounds = sequence_boundaries(batch.targets, batch.cu_seqlens)
    sequences = bounds.numel() - 1
    position = torch.arange(sequences, device=bounds.device)
    group = ragged.owner(batch.cu_groups, sequences)
    if batch.relevance is None:
        worse = position != batch.cu_groups.long()[group]
    else:
        highest = batch.relevance.new_full((batch.cu_groups.numel() - 1,), -torch.inf)
        highest = highest.scatter_reduce(0, group, batch.relevance, "amax")
        worse = batch.relevance < highest[group]
    return ragged.spread(worse, bounds, batch.targets.numel())
