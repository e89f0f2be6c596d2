"""Checked reading of columns: numbers, texts and ranked lists. Errors name row and column."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .table import Row, bad

Text = str | list[dict[str, Any]]  # plain text or a list of {"role", "content"}
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


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def get(data: Row, row: int, column: str) -> Any:
    """The value of a column that must be there."""
    if data.get(column) is None:
        raise bad(row, column, "is null" if column in data else f"is missing among {list(data)}")
    return data[column]


def number(value: Any, row: int, column: str) -> float:
    """A finite real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise bad(row, column, f"must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise bad(row, column, f"must be finite, got {value}")
    return float(value)


def items(data: Row, row: int, column: str, count: int | None = None) -> list[Any]:
    """A list, of `count` entries where that is given."""
    value = get(data, row, column)
    if not isinstance(value, list | tuple):
        raise bad(row, column, f"must be a list, got {type(value).__name__}")
    if count is not None and len(value) != count:
        raise bad(row, column, f"must hold {count} entries, one per response, got {len(value)}")
    return list(value)


def floats(data: Row, row: int, column: str, count: int | None = None) -> list[float]:
    values = items(data, row, column, count)
    return [number(value, row, f"{column}[{i}]") for i, value in enumerate(values)]


def text(value: Any, row: int, column: str) -> Text:
    """A non-empty string or a list of messages with string `role` and `content`."""
    if isinstance(value, str):
        if not value.strip():
            raise bad(row, column, "has no text")
        return value
    if not isinstance(value, list | tuple) or not value:
        raise bad(row, column, f"must be a string or messages, got {type(value).__name__}")
    for message in value:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise bad(row, column, f"a message needs strings role and content, got {message!r}")
    return list(value)


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
    column = "completions" if data.get("completions") is not None else "responses"
    texts = []
    for i, item in enumerate(items(data, row, column)):
        nested = isinstance(item, Mapping) and "completion" in item
        texts.append(text(item["completion"] if nested else item, row, f"{column}[{i}]"))
    if len(texts) < least:
        raise bad(row, column, f"must hold at least {least} responses, got {len(texts)}")
    for i, value in enumerate(texts):
        if distinct and (first := texts.index(value)) != i:
            raise bad(
                row,
                f"{column}[{i}]",
                f"repeats {column}[{first}]; prefkern.data.drop_duplicates removes such responses",
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

    Columns: `prompt` or `context`; `completions` or `responses`; `scores` (higher is better) or
    `ranks` (lower is better) or a column of your own; `responses` without either are stored best
    first; `completions` may be a list of {"rank", "completion"}.
    """
    texts, column = list_texts(data, row, least, distinct)
    scores = list_scores(data, row, column, len(texts), score_column)
    used = {"completions", "responses", "scores", "ranks", "context", score_column, *aligned}
    prompt = "prompt" if data.get("prompt") is not None or "context" not in data else "context"
    rest = {"prompt": text(get(data, row, prompt), row, prompt)}
    rest |= {k: v for k, v in data.items() if k not in used and k != "prompt"}
    further = {name: items(data, row, name, len(texts)) for name in aligned}
    return Ranked(texts, scores, rest, further, column)


def list_scores(
    data: Row, row: int, column: str, count: int, score_column: str | None
) -> list[float]:
    if score_column is not None:
        return floats(data, row, score_column, count)
    given = [name for name in ("scores", "ranks") if data.get(name) is not None]
    if len(given) == 2:
        raise bad(row, "ranks", "stands beside scores; drop one or name it as score_column")
    if given == ["scores"]:
        return floats(data, row, "scores", count)
    if given == ["ranks"]:
        ranks = floats(data, row, "ranks", count)
    elif all(isinstance(item, Mapping) and "rank" in item for item in data[column]):
        ranks = [number(m["rank"], row, f"{column}[{i}].rank") for i, m in enumerate(data[column])]
    elif column == "responses":
        ranks = [float(i) for i in range(count)]
    else:
        raise bad(row, "scores", "is missing, and so is ranks")
    return [max(ranks) - rank for rank in ranks]


def refuse_prompt_bound(data: Row, row: int) -> None:
    """Refuses columns that were computed for the prompt that is about to change."""
    for column in PROMPT_BOUND:
        if data.get(column) is not None:
            raise bad(row, column, "was computed for another prompt; drop the column first")
