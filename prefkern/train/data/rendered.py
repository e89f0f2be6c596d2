"""Whether a chat template wrote what it was given: a role it does not know, a tool call or a list
of tools may vanish without an error, and the model would be trained on another conversation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from .rows import BadRow, Messages, ParsedRow

_PROBE = "Zq7Wxv"  # a word that no template holds
# Of a message: what is checked on its own, and names of no text.
_KNOWN = frozenset({"role", "content", "tool_calls", "tool_call_id", "id"})


def check_rendered(
    messages: Messages,
    place: str,
    text: str,
    render: Callable[[Messages], str],
    known: set[str],
) -> None:
    """Refuses messages that the template left out.

    Args:
        messages: Of the prompt or of one answer.
        place: Their column.
        text: The conversation as rendered.
        render: The same with other messages in their place.
        known: Roles whose messages were seen to be rendered; new ones are added.

    Raises:
        BadRow: a message, or its tool calls, make no difference to the text.
    """
    for i, message in enumerate(messages):
        content, role = message["content"].strip(), message["role"]
        lost = False
        if content and role not in known:
            probe = [*messages[:i], {**message, "content": _PROBE}, *messages[i + 1 :]]
            lost = _same(text, render, probe)
            if not lost:
                known.add(role)
        elif content and content not in text:
            # a template may rewrite a content; one that drops it gives the same text without it
            lost = _same(text, render, [*messages[:i], *messages[i + 1 :]])
        if lost:
            raise _lost(place, i, f"of role {role!r} is")
        names = [n for n in map(_name, message.get("tool_calls", ())) if n and n not in text]
        if names:
            bare = {k: v for k, v in message.items() if k != "tool_calls"}
            if _same(text, render, [*messages[:i], bare, *messages[i + 1 :]]):
                raise _lost(place, i, "has tool calls, which are")


def check_tools(tools: Sequence[Any], text: str, render: Callable[[Sequence[Any]], str]) -> None:
    """Refuses tools that the template left out; `render` gives the text with other tools.

    Raises:
        BadRow: they make no difference to the text.
    """
    names = [n for n in map(_name, tools) if n]
    if names and not any(name in text for name in names) and _same(text, render, []):
        raise BadRow(
            "tools",
            "not rendered",
            "are not rendered by the chat template; drop the column, or use a model whose "
            "template knows tools",
        )


def check_documents(documents: Any, text: str, render: Callable[[], str]) -> None:
    """Refuses documents that the template left out; `render` gives the text without them.

    Raises:
        BadRow: they make no difference to the text.
    """
    if _same(text, lambda _: render(), documents):
        raise BadRow(
            "chat_template_kwargs",
            "not rendered",
            "holds documents, which the chat template does not render; drop them, or use a model "
            "whose template knows documents",
        )


def unread_names(tokenizer: Any, row: ParsedRow, texts: Sequence[str]) -> Counter[str]:
    """What a conversation gives its template under names that do not occur in it, as notes: 1 each.

    A template cannot read a name that it does not spell, but write a whole message as JSON, which
    then is in `texts`, what was rendered; a name that it spells may be read or not.
    """
    template = getattr(tokenizer, "chat_template", None) or ""
    source = " ".join(template.values()) if isinstance(template, dict) else str(template)
    found: Counter[str] = Counter()
    for name in row.template_args:
        if name not in ("tools", "documents") and not _spells(source, name):
            note = (
                f"rows' chat_template_kwargs hold {name!r}, which the chat template does not read"
            )
            found[note] = 1
    parts = [row.prompt, *row.responses]
    messages = [m for part in parts for m in part if isinstance(m, dict)]
    keys = {key for message in messages for key, value in message.items() if value}
    for key in sorted(keys - _KNOWN):
        if not _spells(source, key) and not any(key in text for text in texts):
            found[f"rows' messages hold {key!r}, which the chat template does not read"] = 1
    return found


def _spells(source: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def _lost(place: str, i: int, what: str) -> BadRow:
    return BadRow(
        place,
        "not rendered",
        f"message {i} {what} not rendered by the chat template; change the role, or the template",
    )


def _same(text: str, render: Callable[[Any], str], other: Any) -> bool:
    with suppress(BadRow, TypeError):  # a template that refuses the rest had use for the whole
        return render(other) == text
    return False


def _name(call: Any) -> str:
    """The name of a tool or of a tool call."""
    if not isinstance(call, dict):
        return ""
    inner = call.get("function")
    found = (inner if isinstance(inner, dict) else call).get("name")
    return found if isinstance(found, str) else ""
