"""Pairs of texts to a batch, for loops that have no collator of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class PairCollator:
    """Examples {"prompt", "chosen", "rejected"} (texts) -> input_ids, labels and attention_mask
    [2P, T], chosen and rejected neighbours; prompt and padding are not scored.

    Args:
        tokenizer: Of transformers; a row begins with its bos token where it writes one, an answer
            ends with its eos token.
        max_length: Tokens of a row at most, cut at the end. Default None, all.
    """

    tokenizer: Any
    max_length: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        rows, labels, begin = [], [], self._begin()
        for example in examples:
            for side in ("chosen", "rejected"):
                prompt, answer = begin + self._ids(example["prompt"]), self._ids(example[side])
                answer = [*answer, self.tokenizer.eos_token_id]
                rows.append((prompt + answer)[: self.max_length])
                labels.append(([-100] * len(prompt) + answer)[: self.max_length])
        ones = [[1] * len(row) for row in rows]
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        return {
            "input_ids": _padded(rows, pad), "labels": _padded(labels, -100),
            "attention_mask": _padded(ones, 0),
        }  # fmt: skip

    def _begin(self) -> list[int]:
        """The bos token, where the tokenizer begins texts with it."""
        bos = self.tokenizer.bos_token_id
        first = self.tokenizer("a")["input_ids"][:1]
        return first if bos is not None and first == [bos] else []

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
