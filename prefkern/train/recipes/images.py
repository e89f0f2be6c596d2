"""Vision-language models: pictures beside the prompts (`image_column`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...losses.record import Loss
from .. import models
from ..config import TrainConfig
from ..data.vision import Vision
from ..providers import Provider


def vision_of(config: TrainConfig, tokenizer: Any) -> Vision | None:
    """What reads the pictures of a run; its tokenizer gets the chat template that some models keep
    with their processor alone. None: there is no column of them.

    Raises:
        ValueError: the model has no processor.
    """
    if config.image_column is None:
        return None
    processor = models.load_processor(config.model)
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    # pictures of a batch are made with texts of placeholders beside them, which are padded
    processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
    return Vision(processor, config.image_column)


class Images(Provider):
    """Makes a model that reads pictures a part of the run, and keeps its processor beside it.

    The pictures themselves come with the batches (data/vision.py).
    """

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return config.image_column is not None

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset({"images"})

    def check(self) -> None:
        config = self.config
        for name, value, why in (
            ("head", config.head == "reward", "reward models read texts alone"),
            ("round_data", config.round_data != "same", "rounds write their rows anew, as texts"),
            ("packing", config.packing == "on", "batches with pictures are padded"),
            ("token_budget", config.token_budget, "batches with pictures are padded"),
            ("score_prompt", config.score_prompt, "the places of pictures are no text"),
            ("likelihood_prompt", config.likelihood_prompt, "the places of pictures are no text"),
        ):
            if value:
                raise ValueError(f"{name} does not go with image_column: {why}; drop it.")

    def on_policy(self, policy: Any, resume: Path | None, processes: int) -> None:
        self.processor = models.load_processor(self.config.model)

    def save(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)

    def save_final(self, folder: Path) -> None:
        self.processor.save_pretrained(folder)
