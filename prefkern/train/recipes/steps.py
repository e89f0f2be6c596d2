"""Steps of answers: where they begin, and how alike they are to those of a list's best answer."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ... import losses
from ...losses.record import Loss
from ...losses.weights import step_cosine
from ...objective.segments import sequence_boundaries
from .. import models
from ..config import TrainConfig
from ..data import Encoded, Example
from ..providers import Micro, Opened, Provider
from ..reference import ReferenceRows

INDEX, COSINE = "step_index", "cosine"


class StepIndex(Provider):
    """`step_index` [N] of answers that are split at config.step_pattern, into steps of
    config.step_size tokens, or into config.step_count steps."""

    offers = dict.fromkeys((INDEX,), "--step-pattern")

    def __init__(self, config: TrainConfig, records: Sequence[Loss]) -> None:
        super().__init__(config, records)
        self.tokenizer: Any = None

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        ways = (config.step_pattern, config.step_size, config.step_count)
        return any(way is not None for way in ways)

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset({INDEX} & losses.arguments(record).keys())

    def check(self) -> None:
        names = ", ".join(self.config.loss)
        if INDEX in self.config.columns:
            raise ValueError(
                "the column step_index and an option that splits answers both say where steps are; "
                "drop one."
            )
        if self.config.score_prompt:
            raise ValueError("steps are those of answers, and score_prompt scores prompts too.")
        if not any(map(self._reads, self.records)):
            raise ValueError(
                f"loss {names} reads no steps: drop the option that splits answers, or for oreo "
                "set --loss-arg level=step."
            )

    def _reads(self, record: Loss) -> bool:
        """Whether the loss reads steps with the arguments of this run."""
        known = losses.arguments(record)
        if INDEX not in known:
            return False
        return "level" not in known or self.config.loss_args.get("level") == "step"

    def on_examples(self, examples: list[Example]) -> list[Example]:
        if self.tokenizer is None:
            self.tokenizer = models.load_tokenizer(self.config.model)
        return [replace(e, sequences=tuple(map(self._numbered, e.sequences))) for e in examples]

    def _numbered(self, sequence: Encoded) -> Encoded:
        config, count = self.config, sequence.length
        if config.step_pattern is not None:
            tokens = sequence.input_ids[sequence.completion_start :].tolist()
            index = step_index(tokens, self._text, re.compile(config.step_pattern))
        elif config.step_size is not None:
            index = 1.0 + np.arange(count) // config.step_size
        else:
            index = 1.0 + np.arange(count) * (config.step_count or 1) // max(count, 1)
        return replace(sequence, numbers={**sequence.numbers, INDEX: index})

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def open(self, opened: Opened) -> None:
        answers = [s for e in opened.examples for s in e.sequences]
        split = sum(int(s.numbers[INDEX].max(initial=1)) > 1 for s in answers)
        opened.say(
            f"steps: {split} of {len(answers)} answers have more than one step"
            + ("" if split else ", so every loss of steps is one of whole answers here")
        )

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        return {INDEX: micro.batch.numbers[INDEX].flatten()}


def step_index(
    tokens: Sequence[int], decode: Callable[[Sequence[int]], str], pattern: re.Pattern[str]
) -> np.ndarray:  # [t] float64, as all numbers per token
    """The step of every token of an answer, from 1.

    A match of the pattern begins a step; a match of white space alone ends the one before it. A
    token belongs to the step of its first character, an end token to the last step. What stands
    before the first match is a step of its own unless it is blank.
    """
    text = decode(tokens)
    starts = [m.end() if not m[0].strip() else m.start() for m in pattern.finditer(text)]
    index = np.ones(len(tokens), dtype=np.float64)
    for start in starts:
        if text[:start].strip() and text[start:].strip():
            # the first token whose first character is at `start` or behind it
            at = bisect_left(range(len(tokens)), start, key=lambda n: len(decode(tokens[:n])))
            index[at:] += 1
    return index


class StepCosine(Provider):
    """`cosine` [N] of each step with the same step of the list's best answer, from the policy's own
    detached states; a column that config.columns names takes its place."""

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        needed = any(COSINE in losses.required(record) for record in records)
        return needed and COSINE not in config.columns

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset({COSINE} & losses.arguments(record).keys())

    def from_states(self, micro: Micro, hidden: Tensor) -> dict[str, Any]:
        batch = micro.batch
        assert batch.relevance is not None
        found = step_cosine(
            hidden.detach().flatten(0, 1),
            sequence_boundaries(batch.targets, batch.cu_seqlens),
            batch.cu_groups,
            batch.relevance,
            (batch.targets != -100).flatten(),
            batch.numbers[INDEX].flatten(),
        )
        return {COSINE: found}
