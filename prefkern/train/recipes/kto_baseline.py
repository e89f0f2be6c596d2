"""kto's baseline: the mean log-ratio of prompts with other rows' completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import losses
from ...losses.pointwise.kto import kl_baseline
from ...losses.record import Loss
from ...stats import SeqStats
from ..config import TrainConfig
from ..data import Encoded, Example, collate
from ..providers import Micro, Opened, Provider
from ..reference import ReferenceRows


class KtoBaseline(Provider):
    """`kl_baseline`, over the micro-batches of all ranks."""

    wants_reference = "the reference on mismatched completions"
    counts_rounds = True

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        if "kl_baseline" in config.loss_args:
            return False
        return any("kl_baseline" in losses.required(record) for record in records)

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset({"kl_baseline"})

    def check(self) -> None:
        if self.config.score_prompt:
            name = next(r.name for r in self.records if "kl_baseline" in losses.required(r))
            raise ValueError(
                f"loss {name!r} compares prompts with other rows' answers, which "
                "score_prompt leaves no boundary between; drop score_prompt."
            )

    def open(self, opened: Opened) -> None:
        self.opened = opened
        if len(opened.examples) < 2:
            raise ValueError(
                "kto compares prompts with other rows' answers; the data have one row."
            )

    def begin_step(self, examples: list[Example], progress: float | None) -> None:
        # over the whole step, so that how it is cut into micro-batches changes no pairing
        before = examples[-1:] + examples[:-1]
        if len(examples) == 1:
            before = [_neighbour(examples[0], self.opened.examples)]
        self.before = {id(e): other for e, other in zip(examples, before, strict=True)}

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        before = [self.before[id(example)] for example in micro.examples]
        rows = mismatch(micro.examples, before, self.config.max_length)
        batch = collate(rows, packed=self.opened.packed, pad_id=self.opened.pad_id)
        ratios = self.opened.reference.logratio(batch.to(self.opened.device))
        count = ratios.new_tensor(float(ratios.numel()))
        total = torch.stack((ratios.sum(), count)) * float(micro.real)
        if self.opened.processes.world > 1:
            torch.distributed.all_reduce(total)
        return {"kl_baseline": baseline_from(total[0] / total[1])}


def _neighbour(example: Example, examples: list[Example]) -> Example:
    """The training example before the one of that row, or any other."""
    place = next((i for i, other in enumerate(examples) if other.row == example.row), 0)
    return examples[place - 1]


def mismatch(examples: list[Example], before: list[Example], max_length: int) -> list[Example]:
    """The prompt of each example with the answer of the one in `before`, cut at `max_length`."""
    made = []
    for example, answered in zip(examples, before, strict=True):
        own, other = example.sequences[0], answered.sequences[0]

        def joined(one: np.ndarray, two: np.ndarray, own: Encoded = own, other: Encoded = other):
            parts = [one[: own.completion_start], two[other.completion_start :]]
            return np.concatenate(parts)[:max_length]

        sequence = Encoded(
            joined(own.input_ids, other.input_ids), own.completion_start,
            pictures=own.pictures, vision=own.vision,
            inputs={name: joined(own.inputs[name], other.inputs[name]) for name in own.inputs},
        )  # fmt: skip
        made.append(Example(row=example.row, sequences=(sequence,), desirable=example.desirable))
    return made


def baseline_from(mean_logratio: Tensor) -> Tensor:  # []
    """The baseline from the mean over all ranks, through the loss's own rule."""
    # two equal rows: of one row the loss would say that it has nothing to compare
    rows = mean_logratio.reshape(1).expand(2)
    return kl_baseline(SeqStats(logp=rows, ref_logp=torch.zeros_like(rows)))
