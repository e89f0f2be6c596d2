"""From a stored row to prompt and responses, with a reason for every row that cannot be used.

Columns (TRL's names first): `prompt`, `chosen`, `rejected`; `prompt`, `completion`, `label`;
`prompt` or `context`, `completions` or `responses`, `scores` or `ranks`. A text is a string or a
list of `{"role", "content"}`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
Text = str | Messages


class BadRow(Exception):
    """A row that cannot be used: the column, the reason for counting, and the reason in full."""

    def __init__(self, column: str, kind: str, detail: str = "") -> None:
        super().__init__(column, kind, detail)
        self.column, self.kind, self.detail = column, kind, detail or kind


@dataclass(slots=True)
class ParsedRow:
    prompt: Text
    responses: list[Text]
    labels: tuple[float, ...] | None  # higher is better
    weight: float
    token_weights: list[list[float] | None]
    extra: dict[str, float] | None
    template_args: dict[str, Any]  # for the chat template: tools and chat_template_kwargs
    columns: list[str]  # the column of each response, for messages


def layout_of(data: Mapping[str, Any]) -> str | None:
    """The layout that a row's columns belong to, None when they fit none."""
    has = {name for name, value in data.items() if value is not None}
    if {"chosen", "rejected"} <= has:
        return "pairs"
    if {"completion", "label"} <= has:
        return "unpaired"
    if has & {"responses", "completions"}:
        return "lists"
    return None


def parse_row(
    data: Mapping[str, Any],
    layout: str,
    *,
    list_labels: str = "scores",
    implicit_prompt: bool = False,
) -> ParsedRow:
    """Checks a row of the given layout and brings it into one form.

    Args:
        data: The row.
        layout: "pairs", "lists" or "unpaired".
        list_labels: "scores" or "order"; see `load_examples`.
        implicit_prompt: Whether a pair without prompt is one whose answers begin with it. That
            holds for a whole data set: where other rows have a prompt, one without lost it.

    Raises:
        BadRow: The row cannot be used.
    """
    if layout == "pairs":
        row = _pair(data, implicit_prompt)
    elif layout == "unpaired":
        row = _unpaired(data)
    else:
        row = _list(data, list_labels)
    row.weight = _weight(data)
    row.template_args = _template_args(data)
    for column, response in zip(
        ["prompt", *row.columns], [row.prompt, *row.responses], strict=True
    ):
        if isinstance(response, str) != isinstance(row.prompt, str):
            raise BadRow(
                column,
                "mixed plain and conversational",
                f"is {_kind(response)} where the prompt is {_kind(row.prompt)}; "
                "both must be strings or both lists of messages",
            )
        if _is_blank(response):
            raise BadRow(column, "empty", "has no text")
    return row


def _pair(data: Mapping[str, Any], implicit_prompt: bool) -> ParsedRow:
    chosen, rejected = _text(data, "chosen"), _text(data, "rejected")
    absent = implicit_prompt and data.get("prompt") is None
    prompt = None if absent else _text(data, "prompt")
    # As TRL does: a plain prompt beside conversational answers repeats what the answers hold.
    if prompt is None or (
        isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list)
    ):
        prompt, chosen, rejected = split_prompt(chosen, rejected)
    if chosen == rejected:
        raise BadRow("rejected", "chosen equals rejected", "is the same as chosen")
    weights = [_floats(data, name) for name in ("chosen_weights", "rejected_weights")]
    extra = None
    names = ("ref_chosen_logps", "ref_rejected_logps")
    given = [name for name in names if data.get(name) is not None]
    if len(given) == 1:
        missing = names[1 - names.index(given[0])]
        raise BadRow(missing, "missing", f"is missing beside {given[0]}")
    if given:
        extra = {name: _number(data[name], name) for name in names}
    return ParsedRow(
        prompt, [chosen, rejected], None, 1.0, weights, extra, {}, ["chosen", "rejected"]
    )


def split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """The longest common prefix as prompt, and what remains of the two answers.

    Conversations are split between messages. In plain text a space before the first difference
    goes to the answers, because tokenizers join it to the word that follows.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(
            "rejected",
            "mixed plain and conversational",
            f"is {_kind(rejected)} where chosen is {_kind(chosen)}",
        )
    end = 0
    for a, b in zip(chosen, rejected, strict=False):
        if a != b:
            break
        end += 1
    if isinstance(chosen, str) and end and chosen[end - 1] == " ":
        end -= 1
    if end == 0:
        raise BadRow("prompt", "missing", "is missing, and chosen and rejected share no beginning")
    return chosen[:end], chosen[end:], rejected[end:]


def _unpaired(data: Mapping[str, Any]) -> ParsedRow:
    prompt, completion = _text(data, "prompt"), _text(data, "completion")
    label = _get(data, "label")
    if not isinstance(label, bool):
        raise BadRow("label", "wrong type", f"must be true or false, got {_kind(label)}")
    weights = [_floats(data, "completion_weights")]
    return ParsedRow(prompt, [completion], (float(label),), 1.0, weights, None, {}, ["completion"])


def _list(data: Mapping[str, Any], list_labels: str) -> ParsedRow:
    prompt = _text(
        data, "prompt" if data.get("prompt") is not None or "context" not in data else "context"
    )
    column = "completions" if data.get("completions") is not None else "responses"
    items = _get(data, column)
    if not isinstance(items, list | tuple):
        raise BadRow(column, "wrong type", f"must be a list, got {_kind(items)}")
    if len(items) < 2:
        raise BadRow(column, "fewer than two responses", f"holds {len(items)}; a list needs two")
    names = [f"{column}[{i}]" for i in range(len(items))]
    nested = all(isinstance(item, Mapping) and "completion" in item for item in items)
    if nested:  # NeMo-RL: [{"rank", "completion"}], rank 0 is the best
        texts = [_text(item, "completion", name) for item, name in zip(items, names, strict=True)]
        ranks = [
            _number(item.get("rank"), f"{name}.rank")
            for item, name in zip(items, names, strict=True)
        ]
        labels = [max(ranks) - rank for rank in ranks]
    else:
        texts = [_check_text(item, name) for item, name in zip(items, names, strict=True)]
        labels = _labels(data, column, len(items))
    if min(labels) == max(labels):
        raise BadRow("scores", "all scores equal", "are all equal, so nothing is preferred")
    for i, text in enumerate(texts):
        first = texts.index(text)
        if labels[first] != labels[i]:
            raise BadRow(
                names[i],
                "same response, two scores",
                f"is the same as {names[first]} with another score",
            )
    if list_labels == "order":
        order = sorted(set(labels))
        labels = [float(order.index(label)) for label in labels]
    return ParsedRow(prompt, texts, tuple(labels), 1.0, [None] * len(texts), None, {}, names)


def _labels(data: Mapping[str, Any], column: str, count: int) -> list[float]:
    given = [name for name in ("scores", "ranks") if data.get(name) is not None]
    if len(given) == 2:
        raise BadRow("ranks", "scores and ranks", "stands beside scores; give one of the two")
    if not given:
        if column == "responses":  # stored best first
            return [float(count - 1 - i) for i in range(count)]
        raise BadRow("scores", "missing", "is missing, and so is ranks")
    values = data[given[0]]
    if not isinstance(values, list | tuple):
        raise BadRow(given[0], "wrong type", f"must be a list of numbers, got {_kind(values)}")
    if len(values) != count:
        raise BadRow(given[0], "wrong length", f"holds {len(values)} numbers for {count} {column}")
    out = [_number(value, f"{given[0]}[{i}]") for i, value in enumerate(values)]
    return out if given[0] == "scores" else [max(out) - rank for rank in out]


def _get(data: Mapping[str, Any], column: str) -> Any:
    if data.get(column) is None:
        found = ", ".join(map(repr, data)) or "none"
        detail = "is null" if column in data else f"is missing; the row's columns: {found}"
        raise BadRow(column, "missing", detail)
    return data[column]


def _text(data: Mapping[str, Any], column: str, name: str | None = None) -> Text:
    return _check_text(_get(data, column), name or column)


def _check_text(value: Any, column: str) -> Text:
    if isinstance(value, str):
        _check_unicode(value, column)
        return value
    if not isinstance(value, list | tuple):
        raise BadRow(
            column, "wrong type", f"must be a string or a list of messages, got {_kind(value)}"
        )
    for i, message in enumerate(value):
        where = f"message {i}"
        if not isinstance(message, Mapping):
            raise BadRow(column, "wrong type", f"{where} must be an object, got {_kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise BadRow(
                    column,
                    "wrong type",
                    f"{where} needs a string under {key!r}, got {_kind(message.get(key))}",
                )
            _check_unicode(message[key], column)
    # Parquet fills keys that a message does not have with null; a template must not see them.
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _check_unicode(text: str, column: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(
            column,
            "lone surrogate",
            f"character {error.start + 1} is half of a UTF-16 pair, which is no text",
        ) from error


def _is_blank(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return not text or not any(message["content"].strip() for message in text)


def _number(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BadRow(column, "wrong type", f"must be a number, got {_kind(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BadRow(column, "not finite", f"must be finite, got {number}")
    return number


def _floats(data: Mapping[str, Any], column: str) -> list[float] | None:
    values = data.get(column)
    if values is None:
        return None
    if not isinstance(values, list | tuple):
        raise BadRow(column, "wrong type", f"must be a list of numbers, got {_kind(values)}")
    return [_number(value, f"{column}[{i}]") for i, value in enumerate(values)]


def _weight(data: Mapping[str, Any]) -> float:
    if data.get("weight") is None:
        return 1.0
    weight = _number(data["weight"], "weight")
    if weight < 0:
        raise BadRow("weight", "negative", f"must be at least 0, got {weight}")
    return weight


def _template_args(data: Mapping[str, Any]) -> dict[str, Any]:
    args = data.get("chat_template_kwargs") or {}
    if not isinstance(args, Mapping):
        raise BadRow("chat_template_kwargs", "wrong type", f"must be an object, got {_kind(args)}")
    args = dict(args)
    if data.get("tools"):
        args["tools"] = data["tools"]
    return args


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "null" if value is None else type(value).__name__
