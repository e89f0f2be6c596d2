"""What other models say of every answer, read from caches of `prefkern precompute` (PoFT).

S answers, M models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ... import losses
from ...losses.record import Loss
from .. import reference_cache
from ..config import TrainConfig
from ..data import Example
from ..providers import Micro, Provider
from ..reference import ReferenceRows

TENSOR = "baseline_mean_logps"


class Baseline(Provider):
    """The mean over models of their mean log-probability of each answer."""

    offers = {TENSOR: "--precomputed-baseline"}  # noqa: RUF012 - as the protocol has it

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return bool(config.precomputed_baseline)

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset({TENSOR})

    def check(self) -> None:
        if not any(TENSOR in losses.required(record) for record in self.records):
            readers = [n for n, r in losses.LOSSES.items() if TENSOR in losses.required(r)]
            raise ValueError(
                f"precomputed_baseline is read by loss {' or '.join(readers)}, got "
                f"{list(self.config.loss)}; add that loss or drop precomputed_baseline."
            )
        if TENSOR in self.config.columns:
            raise ValueError(
                f"precomputed_baseline and the column of {TENSOR} both give {TENSOR}; drop one."
            )

    def on_examples(self, examples: list[Example]) -> list[Example]:
        return with_baseline(examples, self.config.precomputed_baseline)

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        return {TENSOR: micro.batch.columns[TENSOR]}


def with_baseline(examples: list[Example], paths: Sequence[str | Path]) -> list[Example]:
    """Pairs or single answers with the number of each answer.

    Raises:
        ValueError: lists, whose answers each run puts in an order of its own; a cache of other
            rows; a value that is not finite.
    """
    if any(example.relevance is not None for example in examples):
        raise ValueError(
            "precomputed_baseline reads pairs and single answers; the data are lists, which the "
            "column baseline_mean_logps of `prefkern score --model` serves."
        )
    stored = [reference_cache.find(path, examples, same_tokens=False) for path in paths]
    means = torch.stack([reference_cache.mean_logps(cache) for cache in stored], 1).mean(1)  # [S]
    each, out = iter(means.tolist()), []
    for example in examples:
        own = [next(each) for _ in example.sequences]
        if not all(torch.isfinite(torch.tensor(own))):
            raise ValueError(f"a baseline's log-probabilities of row {example.row} are not finite.")
        out.append(replace(example, columns={**example.columns, TENSOR: own}))
    return out
