"""What prefkern's losses read beside TRL's pairs: ranked lists, third answers, further columns.

Shapes: G rows of the data set, S answers, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl.data_utils import _tokenize, common_prefix_length
from trl.trainer.utils import pad

COLUMNS = "loss_columns"  # the batch's entry of further columns
_DTYPES = {int: torch.int64, float: torch.float64, bool: torch.bool}


# ---- rows of the data set ------------------------------------------------------------------------


def tokenize_answers(
    dataset: Any, tokenizer: Any, answers: Sequence[str], *, max_length: int | None
) -> Any:
    """prompt and `answers` (one column of a list, or several of one answer each) -> prompt_ids and
    completion_ids, a list of lists, tokenised as TRL tokenises pairs."""

    def ids(text: Any, **options: Any) -> list[int]:
        return _tokenize(tokenizer, text, **options)["input_ids"]

    def one(example: dict[str, Any]) -> dict[str, Any]:
        texts = [example[name] for name in answers]
        if len(answers) == 1:
            texts = texts[0]
            _check_list(answers[0], example)
        prompt = example["prompt"]
        if isinstance(prompt, list):
            start = ids(prompt, add_generation_prompt=True)
            whole = [ids(prompt + answer) for answer in texts]
        else:
            end = tokenizer.eos_token
            start = ids(prompt)
            whole = [ids(prompt + (a if a.endswith(end) else a + end)) for a in texts]
        length = min(common_prefix_length(start, tokens) for tokens in whole)
        return {
            "prompt_ids": start[:length],
            "completion_ids": [tokens[length:] for tokens in whole],
        }

    dataset = dataset.map(one)
    if max_length is None:
        return dataset
    return dataset.filter(lambda example: len(example["prompt_ids"]) < max_length)


def _check_list(column: str, example: Mapping[str, Any]) -> None:
    """Refuses a row whose answers and scores are not two lists of the same length."""
    texts, scores = example[column], example["scores"]
    if not isinstance(texts, list) or len(texts) < 2:
        raise ValueError(f"{column} must be a list of two answers or more, got {texts!r}.")
    if not isinstance(scores, list) or len(scores) != len(texts) or not _numbers(scores):
        raise ValueError(
            f"scores must hold a finite number for each of the {len(texts)} {column} of its row, "
            f"got {scores!r}."
        )


def _numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(v, int | float) and math.isfinite(v) for v in values)


def check_cell(column: str, value: Any, *, single: bool) -> None:
    """Refuses a cell that is no number, nor a list of numbers where more than a `single` one may
    stand."""
    values = value if isinstance(value, list) and not single else [value]
    if not all(isinstance(v, int | float) for v in values):
        what = "a number" if single else "a number or a list of numbers"
        raise ValueError(f"column {column!r} must hold {what} in every row, got {value!r}.")


def check_columns(names: Sequence[str], wanted: Mapping[str, str], what: str) -> None:
    """Refuses a data set without the columns that losses read.

    `wanted`: argument -> column. A column stands for itself, or for `chosen_` and `rejected_` of
    it, numbers of the two answers.
    """
    for argument, column in wanted.items():
        both = {f"chosen_{column}", f"rejected_{column}"}
        if column not in names and not both <= set(names):
            raise ValueError(
                f"{what} reads {argument} from the data set, whose columns are {sorted(names)}: "
                f"add a column {column!r} (a number per row) or {' and '.join(sorted(both))} (a "
                "number per answer, or a list with one per token of it), name another one in "
                f'loss_columns={{"{argument}": ...}}, or give it in loss_args.'
            )


def column_names(names: Sequence[str], wanted: Mapping[str, str]) -> list[str]:
    """Columns of the data set behind `wanted`."""
    found = []
    for column in wanted.values():
        both = [f"chosen_{column}", f"rejected_{column}"]
        found += [column] if column in names else both
    return found


# ---- batches -------------------------------------------------------------------------------------


@dataclass
class WithColumns:
    """A collator that also batches the columns which losses read.

    One number (or list of numbers) per row gives [G] or [G, M], numbers per answer [S] in the order
    of the batch's rows, numbers per token of an answer [S, T] at the positions that score them.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    wanted: dict[str, str]  # argument -> column
    rows: str  # what a row of the data set holds: "pairs", "lists" or "answers"
    max_length: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        names = set(column_names(list(examples[0]), self.wanted))
        batch = self.collator([{k: v for k, v in e.items() if k not in names} for e in examples])
        width = batch["input_ids"].shape[1]
        found = {}
        for argument, column in self.wanted.items():
            values, prompts = self._values(examples, column)
            if prompts and isinstance(values[0], list):
                values = [self._place(v, p, width) for v, p in zip(values, prompts, strict=True)]
            found[argument] = _tensor(values, column)
        return {**batch, COLUMNS: found}

    def _values(self, examples: list[dict[str, Any]], column: str) -> tuple[list[Any], list[int]]:
        """Values in the order of the batch, and the prompt length of each where they belong to
        answers (a list is then one with a number per token)."""
        # rows with images are tokenised by TRL's collator, and hold no numbers per token
        prompts = [len(e["prompt_ids"]) for e in examples if "prompt_ids" in e]
        if column not in examples[0]:
            sides = (f"chosen_{column}", f"rejected_{column}")
            return [e[side] for side in sides for e in examples], prompts * 2
        values = [e[column] for e in examples]
        if self.rows == "lists" and isinstance(values[0], list):
            counts = [len(v) for v in values]
            starts = [p for p, n in zip(prompts, counts, strict=True) for _ in range(n)]
            return [x for v in values for x in v], starts
        return values, prompts if self.rows == "answers" else []

    def _place(self, values: list[float], prompt: int, width: int) -> list[float]:
        """Numbers of an answer's tokens at the positions before them, 0 elsewhere."""
        end = width if self.max_length is None else min(width, self.max_length)
        values = values[: max(end - prompt, 0)]
        row = [0.0] * (prompt - 1) + list(values)
        return row + [0.0] * (width - len(row))


def _tensor(values: list[Any], column: str) -> Tensor:
    first = values[0]
    while isinstance(first, list) and first:
        first = first[0]
    try:
        return torch.tensor(values, dtype=_DTYPES.get(type(first)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"column {column!r} must hold a number in every row, or lists of numbers of one length "
            f"({error}); got {values!r}."
        ) from error


@dataclass
class AnswersCollator:
    """All answers of all rows one below the other, right padded: input_ids, attention_mask and
    completion_mask [S, T], cu_groups [G+1], and relevance [S] where rows have scores."""

    pad_token_id: int
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    scores: str | None = field(default=None)  # the column

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids, masks = [], []
        for example in examples:
            prompt = example["prompt_ids"]
            for answer in example["completion_ids"]:
                ids.append(torch.tensor((prompt + answer)[: self.max_length]))
                mask = [0] * len(prompt) + [1] * len(answer)
                masks.append(torch.tensor(mask[: self.max_length]))
        to: dict[str, Any] = {
            "padding_side": "right",
            "pad_to_multiple_of": self.pad_to_multiple_of,
        }
        sizes = torch.tensor([0] + [len(e["completion_ids"]) for e in examples])
        batch = {
            "input_ids": pad(ids, padding_value=self.pad_token_id, **to),
            "attention_mask": pad([torch.ones_like(i) for i in ids], padding_value=0, **to),
            "completion_mask": pad(masks, padding_value=0, **to),
            "cu_groups": sizes.cumsum(0).int(),
        }
        if self.scores is not None:
            scores = [float(s) for e in examples for s in e[self.scores]]
            batch["relevance"] = torch.tensor(scores, dtype=torch.float64)
        return batch
