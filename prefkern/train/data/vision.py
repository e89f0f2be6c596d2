"""Texts with pictures: their columns, their places in messages, and what a processor makes of them.

In a row's messages a picture is a part {"type": "image"} of a content. Between reading and
rendering it is one character, `MARK`, so that contents are texts like any other's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...prep.cells import BadRow
from ...prep.messages import kind_of
from .pictures import Picture, read_pictures
from .rows import Messages, ParsedRow, Text

MARK = "\ufffc"  # Unicode's object replacement character
Pictures = tuple[Picture, ...]


class Vision:
    """What of the data is pictures, read with a model's processor.

    Args:
        processor: Of transformers, with an image processor and a placeholder (`image_token`).
        column: The column of a row's pictures. `COLUMN_rejected` holds those of the rejected answer
            of a pair where they are others, `COLUMN_cond` those of an answer `cond`.
    """

    def __init__(self, processor: Any, column: str) -> None:
        self.processor, self.column = processor, column
        self.token: str = processor.image_token
        # what some families expand it to is no text either
        inner = getattr(processor.tokenizer, "image_token", None) or self.token
        self.reserved = frozenset({self.token, inner})

    def column_of(self, place: str) -> str:
        """The column of the pictures of the answer in the column `place` alone."""
        return f"{self.column}_{place}"

    def columns(self, places: Iterable[str]) -> set[str]:
        """All columns of pictures."""
        return {self.column, *map(self.column_of, places)}

    # Rows.

    def marked(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """A row with `MARK` for every picture in its messages.

        Raises:
            BadRow: a part that is neither text nor picture, or the mark in a text.
        """
        return {
            name: [_flat(message, name) for message in value]
            if isinstance(value, list | tuple) and all(isinstance(m, Mapping) for m in value)
            else value
            for name, value in data.items()
        }

    def own(self, data: Mapping[str, Any], places: Iterable[str]) -> frozenset[str]:
        """The answers that a row has other pictures for."""
        return frozenset(p for p in places if data.get(self.column_of(p)) is not None)

    def check(self, data: Mapping[str, Any], needed: Iterable[str]) -> None:
        """Refuses a row without pictures, or without those that an answer of `needed` must have.

        Raises:
            BadRow: naming the column.
        """
        for column in (self.column, *map(self.column_of, needed)):
            if data.get(column) is None:
                raise BadRow(column, "missing", f"is missing: {_needed(column, self.column)}")

    def read(self, row: ParsedRow, data: Mapping[str, Any], folder: Path) -> None:
        """Puts the pictures of a checked row into what was parsed of it, and marks of them into
        messages that have none.

        Raises:
            BadRow: a picture cannot be read, or there are more or fewer places for pictures than
                pictures.
        """
        shared = read_pictures(data[self.column], self.column, folder)
        own = {
            place: read_pictures(data[self.column_of(place)], self.column_of(place), folder)
            for place in self.own(data, row.places)
        }
        row.pictures = [own.get(place, shared) for place in row.places]
        prompts = row.prompts or [row.prompt] * len(row.places)
        placed = [
            self._placed(prompt, pictures, self.column_of(place) if place in own else self.column)
            for prompt, pictures, place in zip(prompts, row.pictures, row.places, strict=True)
        ]
        for response, place in zip(row.responses, row.places, strict=True):
            if self._places(response) or self._stray(response):
                raise BadRow(
                    place, "picture in an answer",
                    f"holds a picture or {' or '.join(sorted(self.reserved))}, which stands for "
                    "one; pictures belong in the prompt",
                )  # fmt: skip
        row.prompt = placed[0]
        if row.prompts is not None or own:
            row.prompts = placed

    def _places(self, text: Text) -> int:
        """Places for pictures in a text: placeholders in plain ones, marks in messages."""
        mark = self.token if isinstance(text, str) else MARK
        return sum(content.count(mark) for content in _contents(text))

    def _stray(self, text: Text) -> list[str]:
        """What of a text would be taken for a place and is none."""
        found = self.reserved - {self.token} if isinstance(text, str) else self.reserved
        return sorted(m for m in found if any(m in content for content in _contents(text)))

    def _placed(self, prompt: Text, pictures: Pictures, column: str) -> Text:
        if stray := self._stray(prompt):
            raise BadRow(
                "prompt", "reserved text",
                f"holds {', '.join(stray)}, which stands for a picture and is none here",
            )  # fmt: skip
        count = self._places(prompt)
        if count == 0 and not isinstance(prompt, str):
            first = next((i for i, m in enumerate(prompt) if m["role"] == "user"), None)
            if first is not None:  # as TRL does: before what the user says first
                content = MARK * len(pictures) + prompt[first]["content"]
                return [
                    *prompt[:first],
                    {**prompt[first], "content": content},
                    *prompt[first + 1 :],
                ]
        if count != len(pictures):
            how = f"write {self.token} once for each"
            if not isinstance(prompt, str):
                how = 'give the user\'s message one part {"type": "image"} for each'
            raise BadRow(
                "prompt", "places for pictures",
                f"has {count} places for the {len(pictures)} pictures of column {column!r}; {how}",
            )  # fmt: skip
        return prompt

    # Tokens and tensors.

    def parts(self, messages: Messages) -> Messages:
        """Messages as chat templates of such models read them: contents as lists of parts."""
        found = []
        for message in messages:
            first, *rest = message["content"].split(MARK)
            texts = [first] if not rest else [first, *rest]
            content: list[dict[str, str]] = []
            for i, text in enumerate(texts):
                content += [{"type": "image"}] if i else []
                content += [{"type": "text", "text": text}] if text else []
            found.append({**message, "content": content})
        return found

    def tokens(
        self, texts: Sequence[str], pictures: Pictures, *, special: bool
    ) -> list[tuple[list[int], dict[str, list[int]]]]:
        """Token ids of every text, its placeholders expanded, and what else goes with each token.

        Raises:
            BadRow: a text has another number of placeholders than there are pictures, as a chat
                template may write it, or the processor refuses one.
        """
        for text in texts:
            if (count := text.count(self.token)) != len(pictures):
                raise BadRow(
                    "prompt", "places for pictures",
                    f"comes out of the chat template with {count} {self.token} for "
                    f"{len(pictures)} pictures; is it this model's template?",
                )  # fmt: skip
        opened = [picture.open() for picture in pictures]
        made = self._process(list(texts), [opened] * len(texts), add_special_tokens=special)
        ids = made["input_ids"]
        along = [name for name in made if name.endswith("token_type_ids")]
        return [(list(x), {name: list(made[name][i]) for name in along}) for i, x in enumerate(ids)]

    def _process(self, texts: list[str], images: list[list[Any]], **options: Any) -> Any:
        try:
            return self.processor(text=texts, images=images, **options)
        except (MemoryError, TypeError):
            raise
        except Exception as error:  # a picture too narrow, one with too many pixels
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadRow(self.column, "refused by the processor", reason) from error

    def tensors(self, pictures: Sequence[Pictures]) -> dict[str, Tensor]:
        """What a model's forward reads of the pictures of a batch's sequences: pixels, and what the
        family's processor gives beside them."""
        images = [[picture.open() for picture in own] for own in pictures]
        texts = [self.token * len(own) for own in images]
        made = self.processor(text=texts, images=images, return_tensors="pt", padding=True)
        return {k: v for k, v in made.items() if isinstance(v, Tensor) and not _of_text(k)}


def _contents(text: Text) -> list[str]:
    return [text] if isinstance(text, str) else [message["content"] for message in text]


def cut(along: Mapping[str, Sequence[int]], count: int | None) -> dict[str, np.ndarray]:
    """What goes with the first `count` tokens."""
    return {name: np.asarray(values[:count], dtype=np.int32) for name, values in along.items()}


def _of_text(name: str) -> bool:
    return name in ("input_ids", "attention_mask") or name.endswith("token_type_ids")


def _needed(column: str, shared: str) -> str:
    if column == shared:
        return "every row needs a picture (image_column)"
    return f"the loss reads the chosen answer again under another picture than {shared!r}"


def _is_plain(value: Any) -> bool:
    """Nothing, or a number such as a picture's place among those of its row."""
    return value is None or isinstance(value, int)


def _flat(message: Mapping[str, Any], column: str) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        parts: Sequence[Any] = [{"type": "text", "text": content}]
    elif isinstance(content, list | tuple):
        parts = content
    else:
        return dict(message)
    text = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            if inner := [k for k, v in part.items() if k != "type" and not _is_plain(v)]:
                raise BadRow(
                    column, "picture in a message",
                    f"has a part of type image with {', '.join(map(repr, inner))}; the pictures "
                    "themselves are read from their column",
                )  # fmt: skip
            text += MARK
        elif kind == "text" and isinstance(part.get("text"), str):
            if MARK in part["text"]:
                raise BadRow(
                    column, "reserved character", "holds U+FFFC, which stands for pictures"
                )
            text += part["text"]
        else:
            what = repr(kind) if isinstance(part, Mapping) else kind_of(part)
            raise BadRow(
                column, "wrong type", f"has a part that must be of type text or image, got {what}"
            )
    return {**message, "content": text}
