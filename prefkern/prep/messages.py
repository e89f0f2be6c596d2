"""Messages of a conversation as stored: tool calls, reasoning, and what a file format adds to them.

The same rows give the same messages from JSON lines, Parquet and `datasets`: Arrow fills keys that
one row does not have with null at every depth, and makes 1.0 of every 1 in a place where another
row has 0.5; so a whole number in an object is an integer here. Some data hold their objects as JSON
text, in which a number is as it was written.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]
# Beside `content`, what may be all that a message says.
_SAYS = ("tool_calls", "reasoning_content", "reasoning", "thinking")
# Names of other formats (ShareGPT's, an older one of OpenAI's) and what is read.
_OLD = {"from": "'role'", "value": "'content'", "function_call": "a list 'tool_calls'"}
_EXACT = 2.0**53  # beyond, a float is not every integer


class NotMessages(Exception):
    """The part of a list of messages that is wrong, and how."""


def read_messages(value: list[Any] | tuple[Any, ...]) -> list[Message]:
    """Messages with string `role` and `content`, as `as_json` gives them, tool calls as objects.

    Raises:
        NotMessages: saying which message, and what it must be.
    """
    found = []
    for i, message in enumerate(value):
        where = f"message {i}"
        if not isinstance(message, Mapping):
            raise NotMessages(f"{where} must be an object, got {kind_of(message)}")
        message = as_json(message)
        calls = message.get("tool_calls")
        if calls is not None:
            message["tool_calls"] = _calls(calls, where)
            if not message["tool_calls"]:
                del message["tool_calls"]
        if "content" not in message and any(message.get(key) for key in _SAYS):
            message["content"] = ""  # OpenAI's null beside tool calls
        if (old := _OLD.keys() & message.keys()) and not {"role", "content"} <= message.keys():
            raise NotMessages(
                f"{where} has {', '.join(f'{key!r} where {_OLD[key]}' for key in sorted(old))} "
                "is read; rename it"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise NotMessages(
                    f"{where} needs a string under {key!r}, got {kind_of(message.get(key))}"
                )
        found.append(message)
    return found


def says(message: Mapping[str, Any]) -> bool:
    """Whether a message has text, a tool call or reasoning in it."""
    return bool(message["content"].strip()) or any(message.get(key) for key in _SAYS)


def _calls(value: Any, where: str) -> list[Any]:
    calls = from_json(value)
    if not isinstance(calls, list | tuple) or not all(isinstance(c, Mapping) for c in calls):
        raise NotMessages(f"{where} needs a list of objects under 'tool_calls'")
    found = []
    for call in calls:
        call = dict(call)
        if isinstance(call.get("function"), Mapping):
            call["function"] = _with_arguments(call["function"])
        found.append(_with_arguments(call))
    return found


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are stored as JSON text, as an object: templates write them as JSON again."""
    found = dict(call)
    arguments = found.get("arguments")
    if isinstance(arguments, str) and isinstance(from_json(arguments), dict):
        found["arguments"] = from_json(arguments)
    return found


def with_text_arguments(messages: list[Message]) -> list[Message]:
    """The messages with arguments of tool calls as JSON text, for templates that join strings."""
    out = []
    for message in messages:
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                function = call.get("function")
                if isinstance(function, Mapping) and isinstance(function.get("arguments"), dict):
                    text = json.dumps(function["arguments"], ensure_ascii=False)
                    call = {**call, "function": {**function, "arguments": text}}
                calls.append(call)
            message = {**message, "tool_calls": calls}
        out.append(message)
    return out


def from_json(value: Any) -> Any:
    """What a JSON text holds, nulls left out; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return without_nulls(json.loads(value))
    except (ValueError, RecursionError):
        return value


def as_json(value: Any) -> Any:
    """`value` as JSON lines would have it: without nulls, whole numbers as integers.

    Raises:
        NotMessages: it holds a date.
    """
    if isinstance(value, Mapping):
        return {k: as_json(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        return int(value)
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        raise NotMessages(
            f"the date {value} is no JSON: `datasets` made it of a text, and how that was written "
            "is lost; pass the file itself, or hold the object as JSON text"
        )
    return value


def without_nulls(value: Any) -> Any:
    """`value` without the keys whose value is null, at every depth."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def kind_of(value: Any) -> str:
    """What a value is, in words for a message."""
    if isinstance(value, list):
        return "a list"
    return "null" if value is None else type(value).__name__
