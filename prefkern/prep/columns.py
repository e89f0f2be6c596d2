"""Checked reading of columns for the table functions: numbers, texts, pairs and ranked lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import cells
from .cells import BadRow, Text
from .table import Row

TIES = ("error", "skip")
# Columns that were computed from the prompt and are wrong once it changes.
PROMPT_BOUND = (
    "ref_chosen_logps", "ref_rejected_logps", "prompt_ids", "chosen_ids", "rejected_ids",
)  # fmt: skip


class RankedRow(NamedTuple):
    """One ranked list."""

    texts: list[Text]  # K responses, as stored
    scores: list[float]  # K, higher is better
    rest: Row  # the other columns; `context` became `prompt`
    aligned: dict[str, list[Any]]  # further columns with one entry per response
    column: str  # where the responses stood

    def order(self) -> list[int]:
        """Indices of the responses, best first; equal scores in the order of storage."""
        return sorted(range(len(self.scores)), key=lambda i: -self.scores[i])


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def number_of(data: Row, column: str) -> float:
    """A finite real number that must be there."""
    return cells.number(cells.get(data, column), column)


def list_of(data: Row, column: str, count: int | None = None) -> list[Any]:
    """A list, of `count` entries where that is given."""
    return cells.items(cells.get(data, column), column, count)


def numbers_of(data: Row, column: str, count: int | None = None) -> list[float]:
    return cells.floats(cells.get(data, column), column, count)


def text_of(data: Row, column: str) -> Text:
    """A non-empty string or a list of messages with string `role` and `content`."""
    return cells.filled(cells.text(cells.get(data, column), column), column)


def pair_of(data: Row) -> tuple[Text, Text]:
    """`chosen` and `rejected`, which must differ."""
    chosen, rejected = text_of(data, "chosen"), text_of(data, "rejected")
    if chosen == rejected:
        raise BadRow("rejected", "is the same as chosen")
    return chosen, rejected


def responses_of(data: Row, least: int = 2, distinct: bool = True) -> tuple[list[Text], str]:
    """The responses of a list and their column: at least `least`, all different if `distinct`."""
    column = cells.list_column(data)
    texts = cells.list_texts(data, least)
    for i, value in enumerate(texts):
        cells.filled(value, f"{column}[{i}]")
    for i, value in enumerate(texts):
        if distinct and (first := texts.index(value)) != i:
            raise BadRow(
                f"{column}[{i}]",
                f"repeats {column}[{first}]; prefkern.prep.drop_duplicates removes such responses",
            )
    return texts, column


def ranked(
    data: Row,
    *,
    score_column: str | None = None,
    aligned: Sequence[str] = (),
    least: int = 2,
    distinct: bool = True,
) -> RankedRow:
    """Reads a ranked list.

    Columns: `prompt` or `context`; `completions` or `responses`; scores as in `cells.list_scores`.
    """
    texts, column = responses_of(data, least, distinct)
    scores = cells.list_scores(data, score_column)
    used = {"completions", "responses", "scores", "ranks", "context", score_column, *aligned}
    rest = {"prompt": text_of(data, cells.list_prompt(data))}
    rest |= {k: v for k, v in data.items() if k not in used and k != "prompt"}
    further = {name: list_of(data, name, len(texts)) for name in aligned}
    return RankedRow(texts, scores, rest, further, column)


def refuse_prompt_bound(data: Row) -> None:
    """Refuses columns that were computed for the prompt that is about to change."""
    for column in PROMPT_BOUND:
        if data.get(column) is not None:
            raise BadRow(column, "was computed for another prompt; drop the column first")
