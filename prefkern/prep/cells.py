"""Checked reading of one row: numbers, texts and ranked lists, with a reason where one cannot be
used. The table functions of this package and the trainer read rows through it, each with its own
way of telling: an error that names the row, or a count of skipped rows.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from .messages import NotMessages, kind_of, read_messages, says

Messages = list[dict[str, Any]]
Text = str | Messages


class BadRow(Exception):
    """A row that cannot be used: the column, the reason for counting, and the reason in full."""

    def __init__(self, column: str, kind: str, detail: str = "") -> None:
        super().__init__(column, kind, detail)
        self.column, self.kind, self.detail = column, kind, detail or kind


def get(data: Mapping[str, Any], column: str) -> Any:
    """The value of a column that must be there."""
    if data.get(column) is None:
        found = ", ".join(map(repr, data)) or "none"
        detail = "is null" if column in data else f"is missing; the row's columns: {found}"
        raise BadRow(column, "missing", detail)
    return data[column]


def number(value: Any, column: str) -> float:
    """A finite real number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BadRow(column, "wrong type", f"must be a number, got {kind_of(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise BadRow(column, "not finite", f"must be finite, got {found}")
    return found


def items(value: Any, column: str, count: int | None = None, what: str = "") -> list[Any]:
    """A list (`what` it is of, such as " of numbers"), of `count` entries where that is given."""
    if not isinstance(value, list | tuple):
        raise BadRow(column, "wrong type", f"must be a list{what}, got {kind_of(value)}")
    if count is not None and len(value) != count:
        raise BadRow(
            column,
            "wrong length",
            f"must hold {count} entries, one per response, got {len(value)}",
        )
    return list(value)


def floats(value: Any, column: str, count: int | None = None) -> list[float]:
    """A list of finite real numbers."""
    many = items(value, column, count, " of numbers")
    return [number(item, f"{column}[{i}]") for i, item in enumerate(many)]


def text(value: Any, column: str) -> Text:
    """A string, or a list of messages as `read_messages` gives them; it may be blank."""
    if isinstance(value, str):
        _check_unicode(value, column)
        return value
    if not isinstance(value, list | tuple):
        raise BadRow(
            column, "wrong type", f"must be a string or a list of messages, got {kind_of(value)}"
        )
    try:
        found = read_messages(value)
    except NotMessages as why:
        raise BadRow(column, "wrong type", str(why)) from None
    for message in found:
        for key in ("role", "content"):
            _check_unicode(message[key], column)
    return found


def filled(value: Text, column: str) -> Text:
    """Refuses a text without a letter, and messages without text, tool call or reasoning."""
    blank = not value.strip() if isinstance(value, str) else not any(map(says, value))
    if blank:
        raise BadRow(column, "empty", "has no text")
    return value


def _check_unicode(value: str, column: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            column,
            "lone surrogate",
            f"character {error.start + 1} is half of a UTF-16 pair, which is no text",
        ) from error


def list_prompt(data: Mapping[str, Any]) -> str:
    """The column of a list's prompt."""
    return "prompt" if data.get("prompt") is not None or "context" not in data else "context"


def list_column(data: Mapping[str, Any]) -> str:
    """The column of a list's responses."""
    return "completions" if data.get("completions") is not None else "responses"


def list_texts(data: Mapping[str, Any], least: int = 2) -> list[Text]:
    """The responses of a list, at least `least`; each a text or {"completion": text, ...}."""
    column = list_column(data)
    found = items(get(data, column), column)
    if len(found) < least:
        raise BadRow(
            column,
            "too few responses",
            f"must hold at least {least} responses, got {len(found)}",
        )
    return [
        text(item["completion"] if _nested(item) else item, f"{column}[{i}]")
        for i, item in enumerate(found)
    ]


def is_scored(data: Mapping[str, Any]) -> bool:
    """Whether a row of a list says which response is better by numbers, and not by their order."""
    responses = data.get(list_column(data))
    nested = isinstance(responses, list | tuple) and any(map(_nested, responses))
    return nested or any(data.get(name) is not None for name in ("scores", "ranks"))


def list_scores(data: Mapping[str, Any], score_column: str | None = None) -> list[float]:
    """One number per response, higher is better.

    Columns: `scores`; or `ranks` (lower is better); or {"rank", "completion"} as responses (lower
    is better); `responses` without any are stored best first. `score_column` replaces them all.
    """
    column = list_column(data)
    responses = data[column]
    if score_column is not None:
        return floats(get(data, score_column), score_column, len(responses))
    given = [name for name in ("scores", "ranks") if data.get(name) is not None]
    if len(given) == 2:
        raise BadRow("ranks", "scores and ranks", "stands beside scores; give one of the two")
    if given == ["scores"]:
        return floats(data["scores"], "scores", len(responses))
    if given == ["ranks"]:
        ranks = floats(data["ranks"], "ranks", len(responses))
    elif all(_nested(item) for item in responses):
        ranks = [number(m.get("rank"), f"{column}[{i}].rank") for i, m in enumerate(responses)]
    elif column == "responses":
        ranks = [float(i) for i in range(len(responses))]
    else:
        raise BadRow("scores", "missing", "is missing, and so is ranks")
    return [max(ranks) - rank for rank in ranks]


def _nested(item: Any) -> bool:
    return isinstance(item, Mapping) and "completion" in item
