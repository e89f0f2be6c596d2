"""Checked reading of columns: numbers, texts and ranked lists. Errors name row and column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from . import cells
from .cells import Text
from .table import Row, bad

TIES = ("error", "skip")
# Columns that were computed from the prompt and are wrong once it changes.
PROMPT_BOUND = (
    "ref_chosen_logps", "ref_rejected_logps", "prompt_ids", "chosen_ids", "rejected_ids",
)  # fmt: skip


class Ranked(NamedTuple):
    """One ranked list."""

    texts: list[Text]  # K responses, as stored
    scores: list[float]  # K, higher is better
    rest: Row  # the other columns; `context` became `prompt`
    aligned: dict[str, list[Any]]  # further columns with one entry per response
    column: str  # where the responses stood

    def order(self) -> list[int]:
        """Indices of the responses, best first; equal scores in the order of storage."""
        return sorted(range(len(self.scores)), key=lambda i: -self.scores[i])


@contextmanager
def _of(row: int) -> Iterator[None]:
    """A cell that cannot be used is an error of its row."""
    try:
        yield
    except cells.BadRow as why:
        raise bad(row, why.column, why.detail) from None


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def get(data: Row, row: int, column: str) -> Any:
    """The value of a column that must be there."""
    with _of(row):
        return cells.get(data, column)


def number(value: Any, row: int, column: str) -> float:
    """A finite real number."""
    with _of(row):
        return cells.number(value, column)


def items(data: Row, row: int, column: str, count: int | None = None) -> list[Any]:
    """A list, of `count` entries where that is given."""
    with _of(row):
        return cells.items(cells.get(data, column), column, count)


def floats(data: Row, row: int, column: str, count: int | None = None) -> list[float]:
    with _of(row):
        return cells.floats(cells.get(data, column), column, count)


def text(value: Any, row: int, column: str) -> Text:
    """A non-empty string or a list of messages with string `role` and `content`."""
    with _of(row):
        return cells.filled(cells.text(value, column), column)


def pair(data: Row, row: int) -> tuple[Text, Text]:
    """`chosen` and `rejected`, which must differ."""
    chosen, rejected = (text(get(data, row, c), row, c) for c in ("chosen", "rejected"))
    if chosen == rejected:
        raise bad(row, "rejected", "is the same as chosen")
    return chosen, rejected


def list_texts(
    data: Row, row: int, least: int = 2, distinct: bool = True
) -> tuple[list[Text], str]:
    """The responses of a list and their column: at least `least`, all different if `distinct`."""
    column = cells.list_column(data)
    with _of(row):
        texts = cells.list_texts(data, least)
        for i, value in enumerate(texts):
            cells.filled(value, f"{column}[{i}]")
    for i, value in enumerate(texts):
        if distinct and (first := texts.index(value)) != i:
            raise bad(
                row,
                f"{column}[{i}]",
                f"repeats {column}[{first}]; prefkern.prep.drop_duplicates removes such responses",
            )
    return texts, column


def ranked(
    data: Row,
    row: int,
    *,
    score_column: str | None = None,
    aligned: Sequence[str] = (),
    least: int = 2,
    distinct: bool = True,
) -> Ranked:
    """Reads a ranked list.

    Columns: `prompt` or `context`; `completions` or `responses`; scores as in `cells.list_scores`.
    """
    texts, column = list_texts(data, row, least, distinct)
    with _of(row):
        scores = cells.list_scores(data, score_column)
    used = {"completions", "responses", "scores", "ranks", "context", score_column, *aligned}
    prompt = cells.list_prompt(data)
    rest = {"prompt": text(get(data, row, prompt), row, prompt)}
    rest |= {k: v for k, v in data.items() if k not in used and k != "prompt"}
    further = {name: items(data, row, name, len(texts)) for name in aligned}
    return Ranked(texts, scores, rest, further, column)


def refuse_prompt_bound(data: Row, row: int) -> None:
    """Refuses columns that were computed for the prompt that is about to change."""
    for column in PROMPT_BOUND:
        if data.get(column) is not None:
            raise bad(row, column, "was computed for another prompt; drop the column first")
