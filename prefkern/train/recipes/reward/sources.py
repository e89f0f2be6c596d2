"""MORE: weights of the preference sources, anew in every step from gradients at the reward head.

S texts, G groups, n sources, D inputs of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .... import losses
from ....losses.listwise.more import head_gradients, source_weights
from ....losses.record import Loss
from ....prep.annotators import UNKNOWN
from ...config import TrainConfig
from ...data import Example, PreferenceBatch
from ...providers import Micro
from ...reference import ReferenceRows
from .model import Outputs
from .step import ScoreProvider

TENSORS = ("source", "source_weights")


class Sources(ScoreProvider):
    """`source` from the column of that name, `source_weights` of each micro-batch."""

    wants_features = True

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return config.head == "reward" and any(
            set(TENSORS) <= set(losses.required(record)) for record in records
        )

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset({"source_weights"})  # the names of `source` are a column

    @property
    def takes(self) -> frozenset[str]:
        return frozenset({"normalize"})

    def check(self) -> None:
        if (self.config.num_outputs or 1) != 1:
            raise ValueError(
                "the weights of sources come from the gradients of one score; set num_outputs=1."
            )
        if self.config.gradient_accumulation_steps != 1:
            raise ValueError(
                "the weights of sources are those of a whole step; use "
                "gradient_accumulation_steps=1 and a larger batch."
            )

    def on_examples(self, examples: list[Example]) -> list[Example]:
        found = sorted({str(example.columns["source"]) for example in examples})
        if found == [UNKNOWN]:
            raise ValueError(
                "no row has a column 'source' with the name of its preference data; --column "
                "source=NAME reads another column."
            )
        if not hasattr(self, "names"):
            self.names = found
        if new := [name for name in found if name not in self.names]:
            raise ValueError(f"source {new[0]!r} of eval_dataset is none of {self.names}.")
        return examples

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        names = micro.batch.columns["source"]
        device = micro.batch.input_ids.device
        self.source = torch.tensor([self.names.index(str(x)) for x in names], device=device)
        return {"source": self.source}

    def from_scores(
        self, outputs: Outputs, scores: Tensor, batch: PreferenceBatch
    ) -> dict[str, Any]:
        assert outputs.features is not None and batch.relevance is not None
        gradients, means = head_gradients(
            outputs.features, scores, batch.relevance, batch.cu_groups, self.source,
            len(self.names), backend=self.config.backend,
        )  # fmt: skip
        present = torch.zeros(len(self.names), dtype=torch.bool, device=scores.device)
        present[self.source] = True
        self.weights = source_weights(
            gradients, means, present=present,
            normalize=str(self.config.loss_args.get("normalize", "none")),
        )  # fmt: skip
        return {"source_weights": self.weights}

    def metrics(self) -> dict[str, Tensor]:
        return {f"weights/{n}": w for n, w in zip(self.names, self.weights, strict=True)}
