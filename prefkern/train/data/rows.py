"""From a stored row to prompt and responses, with a reason for every row that cannot be used.

Columns (TRL's names first): `prompt`, `chosen`, `rejected`; `prompt`, `completion`, `label`;
`prompt` or `context`, `completions` or `responses`, `scores` or `ranks`. A text is a string or a
list of `{"role", "content"}`. A list may have `prompts`, one for each of its answers, and null for
the score of an answer that is not ranked. A pair may have answers beside the two (`gold`, `cond`)
and prompts of their own for them (`prompt_rejected`, `prompt_cond`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...prep.cells import (
    BadRow,
    Messages,
    Text,
    filled,
    floats,
    get,
    items,
    kind_of,
    list_column,
    list_prompt,
    list_scores,
    list_texts,
    number,
    text,
)
from ...prep.messages import NotMessages, as_json, from_json
from .columns import Column
from .pictures import Picture

# Arguments of apply_chat_template that a row may not bring.
_NOT_OF_A_ROW = frozenset(
    {
        "chat_template", "conversation", "add_generation_prompt", "continue_final_message",
        "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs",
    }
)  # fmt: skip

_ASKS = ("system", "developer", "user")  # roles that answer nothing

__all__ = ["BadRow", "Messages", "ParsedRow", "Text", "layout_of", "parse_row", "split_prompt"]


@dataclass(slots=True)
class ParsedRow:
    """What stood in a row, checked and in one form for all layouts."""

    prompt: Text
    responses: list[Text]
    places: list[str]  # the column of each response, for messages
    relevance: tuple[float, ...] | None = None  # lists: higher is better
    desirable: bool | None = None  # single answers
    token_weights: list[list[float] | None] = field(default_factory=list)  # one per response
    ref_seq_logp: tuple[float, ...] | None = None
    prompts: list[Text] | None = None  # one per response, where they differ
    weight: float = 1.0
    template_args: dict[str, Any] = field(default_factory=dict)  # tools and chat_template_kwargs
    columns: dict[str, Any] = field(default_factory=dict)  # extra columns, by argument name
    first_answer: int = 0  # place of responses[0] in the whole row
    pictures: list[tuple[Picture, ...]] = field(default_factory=list)  # one entry per response

    def parts(self) -> list[ParsedRow]:
        """Rows with one prompt each: this one, or one per response."""
        if self.prompts is None:
            return [self]
        return [
            replace(
                self, prompt=prompt, responses=[response], token_weights=[weights],
                places=[place], prompts=None, first_answer=i, pictures=self.pictures[i : i + 1],
            )
            for i, (prompt, response, weights, place) in enumerate(
                zip(self.prompts, self.responses, self.token_weights, self.places, strict=True)
            )
        ]  # fmt: skip


def layout_of(data: Mapping[str, Any], *, labelled: bool = True) -> str | None:
    """The layout that a row's columns belong to, None when they fit none."""
    has = {name for name, value in data.items() if value is not None}
    if {"chosen", "rejected"} <= has:
        return "pairs"
    if {"completion", "label"} <= has or ("completion" in has and not labelled):
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
    labelled: bool = True,
    roles: Mapping[str, Column] | None = None,
    pictured: frozenset[str] = frozenset(),
) -> ParsedRow:
    """Checks a row of the given layout and brings it into one form.

    Args:
        data: The row.
        layout: "pairs", "lists" or "unpaired".
        list_labels: "scores" or "order"; see `Loader`.
        implicit_prompt: Whether a pair without prompt is one whose answers begin with it. That
            holds for a whole data set: where other rows have a prompt, one without lost it.
        labelled: Whether single answers must have a label.
        roles: Answers of a pair beside chosen and rejected ("gold", "cond") and their columns.
        pictured: Columns of answers that have pictures of their own, and so may have the same text.

    Raises:
        BadRow: The row cannot be used.
    """
    if layout == "pairs":
        row = _pair(data, implicit_prompt, roles or {}, pictured)
    elif layout == "unpaired":
        row = _unpaired(data, labelled)
    else:
        row = _list(data, list_labels)
    row.weight = _weight(data)
    row.template_args = template_args(data)
    for column, response in zip(
        ["prompt", *row.places, *(f"prompt_{c}" for c in row.places if row.prompts)],
        [row.prompt, *row.responses, *(row.prompts or [])],
        strict=True,
    ):
        if isinstance(response, str) != isinstance(row.prompt, str):
            raise BadRow(
                column,
                "mixed plain and conversational",
                f"is {kind_of(response)} where the prompt is {kind_of(row.prompt)}; "
                "both must be strings or both lists of messages",
            )
        filled(response, column)
    for column, response in zip(row.places, row.responses, strict=True):
        if not isinstance(response, str) and all(m["role"] in _ASKS for m in response):
            raise BadRow(
                column, "no answer",
                f"holds messages of {response[-1]['role']!r} alone, and an answer is the "
                "assistant's",
            )  # fmt: skip
    return row


def _pair(
    data: Mapping[str, Any],
    implicit_prompt: bool,
    roles: Mapping[str, Column],
    pictured: frozenset[str],
) -> ParsedRow:
    chosen, rejected = _text(data, "chosen"), _text(data, "rejected")
    absent = implicit_prompt and data.get("prompt") is None
    prompt = None if absent else _text(data, "prompt")
    # As TRL does: a plain prompt repeats what conversational answers begin with.
    if prompt is None or (
        isinstance(prompt, str)
        and isinstance(chosen, list)
        and isinstance(rejected, list)
        and chosen[:1] == rejected[:1] != []
        and chosen[0]["role"] in ("system", "developer", "user")
    ):
        if roles or data.get("prompt_rejected") is not None:
            raise BadRow("prompt", "missing", "must stand in a column of its own, as the answers")
        prompt, chosen, rejected = split_prompt(chosen, rejected)
    prompt = _as_messages(prompt, [chosen, rejected])
    prompts = {"chosen": prompt, "rejected": prompt}
    answers = {"chosen": chosen, "rejected": rejected}
    if data.get("prompt_rejected") is not None:
        prompts["rejected"] = _text(data, "prompt_rejected")
    for role, entry in roles.items():
        # The chosen answer under another condition is the usual `cond`.
        conditional, column = role == "cond", entry.column
        wanted = f"prompt_{column}" if conditional else column
        asked = data.get(wanted) is not None
        if not asked and not (conditional and role in pictured):
            raise entry.missing(wanted)
        same = conditional and data.get(column) is None
        answers[role] = chosen if same else _text(data, column)
        prompts[role] = _text(data, wanted) if conditional and asked else prompt
    if chosen == rejected and prompts["rejected"] == prompt and "rejected" not in pictured:
        raise BadRow("rejected", "chosen equals rejected", "is the same as chosen")
    weights = [_floats(data, f"{name}_weights") for name in answers]
    reference = None
    names = ("ref_chosen_logps", "ref_rejected_logps")
    given = [name for name in names if data.get(name) is not None]
    if len(given) == 1:
        missing = names[1 - names.index(given[0])]
        raise BadRow(missing, "missing", f"is missing beside {given[0]}")
    if given:
        reference = tuple(number(data[name], name) for name in names)
    own = None if all(p == prompt for p in prompts.values()) else list(prompts.values())
    return ParsedRow(
        prompt, list(answers.values()), list(answers), token_weights=weights,
        ref_seq_logp=reference, prompts=own,
    )  # fmt: skip


def _as_messages(prompt: Text, answers: list[Text]) -> Text:
    """A plain prompt of answers that are all messages is what the user says."""
    if isinstance(prompt, str) and prompt.strip() and all(isinstance(a, list) for a in answers):
        return [{"role": "user", "content": prompt}]
    return prompt


def split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """The longest common prefix as prompt, and what remains of the two answers.

    Conversations are split between messages. In plain text a space before the first difference
    goes to the answers, because tokenizers join it to the word that follows.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow(
            "rejected",
            "mixed plain and conversational",
            f"is {kind_of(rejected)} where chosen is {kind_of(chosen)}",
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


def _unpaired(data: Mapping[str, Any], labelled: bool) -> ParsedRow:
    prompt, completion = _text(data, "prompt"), _text(data, "completion")
    label = None
    if labelled or data.get("label") is not None:
        label = get(data, "label")
        if not isinstance(label, bool):
            raise BadRow("label", "wrong type", f"must be true or false, got {kind_of(label)}")
    weights = [_floats(data, "completion_weights")]
    prompt = _as_messages(prompt, [completion])
    return ParsedRow(prompt, [completion], ["completion"], desirable=label, token_weights=weights)


def _list(data: Mapping[str, Any], list_labels: str) -> ParsedRow:
    texts = list_texts(data)
    prompts = None if data.get("prompts") is None else _prompts(data, len(texts))
    prompt = _text(data, list_prompt(data)) if prompts is None else prompts[0]
    scores = _list_scores(data)
    prompt = _as_messages(prompt, texts)
    places = [f"{list_column(data)}[{i}]" for i in range(len(texts))]
    ranked = [score for score in scores if not math.isnan(score)]
    if not ranked or min(ranked) == max(ranked):
        raise BadRow("scores", "all scores equal", "are all equal, so nothing is preferred")
    asked = [(prompts or [prompt] * len(texts))[i] for i in range(len(texts))]
    both = list(zip(asked, texts, strict=True))
    for i, response in enumerate(both):
        first = both.index(response)
        if first != i and scores[first] != scores[i]:
            raise BadRow(
                places[i],
                "same response, two scores",
                f"is the same as {places[first]} with another score",
            )
    if list_labels == "order":
        order = sorted(set(ranked))
        scores = [s if math.isnan(s) else float(order.index(s)) for s in scores]
    none: list[list[float] | None] = [None] * len(texts)
    return ParsedRow(
        prompt, texts, places, relevance=tuple(scores), token_weights=none, prompts=prompts
    )


def _prompts(data: Mapping[str, Any], count: int) -> list[Text]:
    """Prompts of the answers' own, where each has another."""
    many = items(data["prompts"], "prompts", count, " of texts")
    return [text(item, f"prompts[{i}]") for i, item in enumerate(many)]


def _list_scores(data: Mapping[str, Any]) -> list[float]:
    """One number per response; NaN, null in the column scores, for one that is not ranked."""
    given = data.get("scores")
    if not isinstance(given, list | tuple) or None not in given:
        return list_scores(data)
    there = [0.0 if score is None else score for score in given]
    found = list_scores({**data, "scores": there})
    return [math.nan if a is None else b for a, b in zip(given, found, strict=True)]


def _floats(data: Mapping[str, Any], column: str) -> list[float] | None:
    values = data.get(column)
    return None if values is None else floats(values, column)


def _text(data: Mapping[str, Any], column: str) -> Text:
    return text(get(data, column), column)


def _weight(data: Mapping[str, Any]) -> float:
    if data.get("weight") is None:
        return 1.0
    weight = number(data["weight"], "weight")
    if weight < 0:
        raise BadRow("weight", "negative", f"must be at least 0, got {weight}")
    return weight


def template_args(data: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives its chat template beside the messages: tools and named arguments."""
    args = _object(data.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(args, Mapping):
        raise BadRow(
            "chat_template_kwargs", "wrong type", f"must be an object, got {kind_of(args)}"
        )
    args = dict(args)
    if taken := sorted(_NOT_OF_A_ROW & args.keys()):
        raise BadRow(
            "chat_template_kwargs",
            "not a row's to give",
            f"must not hold {', '.join(taken)}: a row brings no template and no option of "
            "apply_chat_template",
        )
    tools = _object(data.get("tools"), "tools") or from_json(args.get("tools"))
    if tools:
        if isinstance(tools, list):
            tools = [from_json(tool) for tool in tools]
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise BadRow(
                "tools", "wrong type",
                "must be a list of objects, or one as JSON text, got "
                + ("a text that is no JSON" if isinstance(tools, str) else kind_of(tools)),
            )  # fmt: skip
        args["tools"] = tools
    return args


def _object(value: Any, column: str) -> Any:
    """What a column holds, or what its JSON text says."""
    try:
        return from_json(value) if isinstance(value, str) else as_json(value)
    except NotMessages as why:
        raise BadRow(column, "wrong type", str(why)) from None
