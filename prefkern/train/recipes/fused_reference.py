"""Several models fused into one reference (InfiFPO), read from caches of `prefkern precompute`.

G groups, M source models.
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

# What the loss reads of a pair: mean log-probabilities under each source [M].
TENSORS = ("source_chosen_mean_logps", "source_rejected_mean_logps")


class FusedReference(Provider):
    """The sources' mean log-probabilities of every answer.

    The loss itself clips them against the policy's start and chooses among them
    (`losses.pairwise.infifpo.fused_reference`).
    """

    offers = dict.fromkeys(TENSORS, "--fused-ref")

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return bool(config.fused_ref)

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset(TENSORS)

    def check(self) -> None:
        if not any(TENSORS[0] in losses.required(record) for record in self.records):
            readers = [n for n, r in losses.LOSSES.items() if TENSORS[0] in losses.required(r)]
            raise ValueError(
                f"fused_ref is the reference of loss {' or '.join(readers)}, got "
                f"{list(self.config.loss)}; add that loss or drop fused_ref."
            )

    def on_examples(self, examples: list[Example]) -> list[Example]:
        return with_sources(examples, self.config.fused_ref)

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        return {name: micro.batch.columns[name] for name in TENSORS}


def with_sources(examples: list[Example], paths: Sequence[str | Path]) -> list[Example]:
    """Pairs with mean log-probabilities under each source model [M].

    Raises:
        ValueError: data that are not pairs, a cache of other rows, a value that is not finite.
    """
    if any(len(example.sequences) != 2 for example in examples):
        raise ValueError("fused_ref fuses references of pairs; the data are not pairs.")
    stored = [reference_cache.find(path, examples, same_tokens=False) for path in paths]
    means = torch.stack([reference_cache.mean_logps(cache) for cache in stored], 1)
    means = means.view(len(examples), 2, len(paths))  # [G, 2, M]
    if not bool(means.isfinite().all()):
        row = int((~means.isfinite()).nonzero()[0][0])
        raise ValueError(f"a source's log-probabilities of row {examples[row].row} are not finite.")
    return [
        replace(
            example,
            columns={**example.columns, **dict(zip(TENSORS, both.tolist(), strict=True))},
        )
        for example, both in zip(examples, means, strict=True)
    ]
