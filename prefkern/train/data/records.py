"""The records that pass between tokenising, batching and the training loop.

S sequences, G groups, T packed tokens. A group is what answers one prompt: a pair, a list, or one
answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .pictures import Picture

LAYOUTS = ("pairs", "lists", "unpaired")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One prompt with one response, as token ids.

    Arrays, not lists of Python integers: a list needs 8 bytes per reference and 28 per integer,
    about nine times the memory.
    """

    input_ids: np.ndarray  # [t] int32, prompt then response
    completion_start: int  # position of the first response token in input_ids
    token_weights: np.ndarray | None = None  # [t - completion_start] fp32, one per response token
    # [t - completion_start] each: what else the row, or a cache, holds per response token
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()  # of the prompt, in order
    vision: Any = None  # data.vision.Vision, which makes tensors of them
    # [t] int32 each: what the model's forward reads beside the ids, such as token types
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Number of scored tokens, that is tokens of the response."""
        return len(self.input_ids) - self.completion_start


@dataclass(frozen=True, slots=True)
class Example:
    """One group: everything that one row of a data set became."""

    row: int  # line of the file, from 1; index of the row, from 0, in other sources
    sequences: tuple[Encoded, ...]  # pair: chosen, rejected; list: after the seeded shuffle
    relevance: tuple[float, ...] | None = None  # lists: one per answer, higher is better
    desirable: bool | None = None  # single answers with a label
    weight: float = 1.0
    ref_seq_logp: tuple[float, ...] | None = None  # pairs: ref_chosen_logps, ref_rejected_logps
    columns: Mapping[str, Any] = field(default_factory=dict)  # by argument name, see columns.py
    text: int = 0  # hash of prompt and answers before the tokenizer
    truncated: bool = False  # max_length cut one of the answers

    @property
    def num_tokens(self) -> int:
        return sum(len(seq.input_ids) for seq in self.sequences)


@dataclass
class SkipReport:
    """What was read, kept and left out, and why; `str()` gives the text to show.

    Attributes:
        rows: Rows seen, blank lines excepted.
        kept: Rows that became an `Example`.
        truncated: Kept rows of which at least one response was cut at `max_length`.
        counts: Left-out rows per reason, the reason without the row's own numbers.
        examples: One line per left-out row, "file.jsonl.gz:17 column 'chosen': reason", at most
            `max_examples` of them.
        notes: Columns that act, columns that are not read, what was done to texts and labels.
        ordered: Whether of the labels of lists only their order was kept.
    """

    rows: int = 0
    kept: int = 0
    truncated: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ordered: bool = False
    max_examples: int = 50

    @property
    def total(self) -> int:
        """Number of rows left out."""
        return sum(self.counts.values())

    def add(self, kind: str, message: str) -> None:
        self.counts[kind] += 1
        if len(self.examples) < self.max_examples:
            self.examples.append(message)

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "kept": self.kept,
            "skipped": self.total,
            "truncated": self.truncated,
            "reasons": dict(sorted(self.counts.items())),
            "examples": list(self.examples),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.kept} of {self.rows} rows kept, {self.truncated} of them truncated, "
            f"{self.total} skipped"
        ]
        lines += [f"  {n} x {kind}" for kind, n in self.counts.most_common()]
        lines += [f"    {text}" for text in self.examples]
        hidden = self.total - len(self.examples)
        if hidden > 0:
            lines.append(f"    and {hidden} more")
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


class Loaded(NamedTuple):
    """One data set, ready for batches."""

    examples: list[Example]
    layout: str  # one of LAYOUTS
    report: SkipReport


@dataclass(slots=True)
class PreferenceBatch:
    """One batch on one device; rows are [1, T] packed or [B, T] right-padded (then B = S)."""

    input_ids: Tensor  # [1, T] or [B, T] int64
    position_ids: Tensor  # same shape, int64, from 0 in every sequence
    attention_mask: Tensor | None  # [B, T] int64, 1 = token; None when packed
    targets: Tensor  # same shape, int64: the next token where it is scored, else -100
    likelihood_targets: Tensor | None  # like targets; likelihood terms score more
    cu_seqlens: Tensor | None  # [S+1] int32, packed token boundaries; None when padded
    cu_groups: Tensor  # [G+1] int32, sequences of each group
    relevance: Tensor | None  # [S] fp32 (lists)
    desirable: Tensor | None  # [S] bool (single answers with labels)
    token_weights: Tensor | None  # same shape as targets, fp32, 0 where nothing is scored
    weights: Tensor | None  # [G] fp32; None: every group counts alike
    ref_seq_logp: Tensor | None  # [S] fp64, from ref_chosen_logps and ref_rejected_logps
    numbers: dict[str, Tensor]  # same shape as targets each, 0 where nothing is scored
    columns: dict[str, Any]  # see columns.batch_columns
    inputs: dict[str, Tensor]  # what forwards read beside the ids: pixels and the like
    rows: list[int]  # [G] rows of the data set
    num_scored: int
    num_tokens: int  # padding not counted

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        """The same batch with every tensor on `device`."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, dict):
                return {name: moved(part) for name, part in value.items()}
            return value

        return PreferenceBatch(**{name: moved(getattr(self, name)) for name in self.__slots__})
