"""Text in front of a prompt: a system message, or plain text before plain text."""

from __future__ import annotations

from collections.abc import Iterator

from .cells import BadRow
from .columns import Text, refuse_prompt_bound, text_of
from .table import Row, Table, map_rows

SEPARATOR = "\n\n"


def prefixed(prompt: Text, words: str, separator: str = SEPARATOR) -> Text:
    """`prompt` with `words` in front.

    A conversation gets them as system message, ahead of the text of one that is there already;
    plain text gets them and `separator` before its first character.
    """
    if isinstance(prompt, str):
        return f"{words}{separator}{prompt}"
    if prompt[0]["role"] == "system":
        first = {**prompt[0], "content": f"{words}{separator}{prompt[0]['content']}"}
        return [first, *prompt[1:]]
    return [{"role": "system", "content": words}, *prompt]


def system_messages(table: Table, *, column: str = "system", separator: str = SEPARATOR) -> Table:
    """Moves the system message of every row from a column of its own into the prompt.

    Source: Janus (arXiv 2405.17977), which writes one system message per example and then trains
    with likelihood, DPO or ORPO on it. Any layout will do; the answers are not touched.

    Columns in: `prompt`, `system` (str).
    Columns out: `prompt`; `system` is gone, other columns are carried along.

    Args:
        table: Pairs, lists or single answers with a prompt.
        column: Column of the system message, default "system".
        separator: Between system text and a plain-text prompt, default an empty line.

    Raises:
        ValueError: Names row and column: a missing or blank system message or prompt, or a column
            computed for the prompt without it, such as `ref_chosen_logps`.
    """

    def moved(data: Row) -> Iterator[Row]:
        words = text_of(data, column)
        if not isinstance(words, str):
            raise BadRow(column, "must be a string")
        row = conditioned(data, words, separator)
        yield {k: v for k, v in row.items() if k != column}

    return map_rows(table, moved)


def conditioned(data: Row, words: str, separator: str) -> Row:
    """The row with `words` before its prompt."""
    refuse_prompt_bound(data)
    return data | {"prompt": prefixed(text_of(data, "prompt"), words, separator)}


def swapped(data: Row, *further: tuple[str, str]) -> Row:
    """The pair the other way round: every chosen_<x> with rejected_<x>, and `further` columns."""
    if data.get("pref_prob") is not None:
        raise BadRow("pref_prob", "is the strength of the given order only; drop the column")
    exchange = dict(further) | {other: one for one, other in further}
    for name in data:
        for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
            if name == one or name.startswith(f"{one}_"):
                exchange[name] = other + name.removeprefix(one)
    for name, other in exchange.items():
        if other not in data:
            raise BadRow(name, f"has no counterpart {other!r} to be exchanged with")
    return data | {other: data[name] for name, other in exchange.items()}
