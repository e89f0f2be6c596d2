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
        if self.config.per_device_train_batch_size == 1:
            opened.say(
                "kto: with one row per micro-batch the mismatched answer is the row's own; "
                "use >= 2."
            )

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        rows = mismatch(micro.examples, self.config.max_length)
        batch = collate(rows, packed=self.opened.packed, pad_id=self.opened.pad_id)
        ratios = self.opened.reference.logratio(batch.to(self.opened.device))
        count = ratios.new_tensor(float(ratios.numel()))
        total = torch.stack((ratios.sum(), count)) * float(micro.real)
        if self.opened.world > 1:
            torch.distributed.all_reduce(total)
        return {"kl_baseline": baseline_from(total[0] / total[1])}


def mismatch(examples: list[Example], max_length: int) -> list[Example]:
    """Prompt i with the completion of prompt i - 1 (rotation by one), cut at `max_length`."""
    rotated = []
    for example, before in zip(examples, examples[-1:] + examples[:-1], strict=True):
        own, other = example.sequences[0], before.sequences[0]
        ids = np.concatenate(
            [own.input_ids[: own.completion_start], other.input_ids[other.completion_start :]]
        )[:max_length]
        sequences = (Encoded(ids, own.completion_start),)
        rotated.append(Example(row=example.row, sequences=sequences, desirable=example.desirable))
    return rotated


def baseline_from(mean_logratio: Tensor) -> Tensor:  # []
    """The baseline from the mean over all ranks, through the loss's own rule."""
    # two equal rows: the warning about single-row batches is given once, when the run is opened
    rows = mean_logratio.reshape(1).expand(2)
    return kl_baseline(SeqStats(logp=rows, ref_logp=torch.zeros_like(rows)))
