"""What stands in the rows of a data set beside what is read of them: told, or refused.

A column that carries the task under a name nobody reads, pictures that a text model cannot see and
a column whose common name changes the loss would all train something else without an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ...prep.cells import list_column
from .columns import Column
from .read import RawRow

# Columns that may stand under another name, by --column NAME=COLUMN.
TEXTS = ("prompt", "chosen", "rejected", "completion", "label", "responses", "scores", "weight")
_READ = {
    "pairs": (
        "prompt", "chosen", "rejected", "prompt_rejected", "chosen_weights", "rejected_weights",
        "ref_chosen_logps", "ref_rejected_logps",
    ),
    "unpaired": ("prompt", "completion", "label", "completion_weights"),
    "lists": ("prompt", "prompts", "context", "completions", "responses", "scores", "ranks"),
}  # fmt: skip
_EVERYWHERE = (
    "weight", "tools", "chat_template_kwargs", "stage",
    "chosen_score", "rejected_score", "finished",  # written by prefkern.prep, for people
)  # fmt: skip
# Columns that act by their name alone, and how.
_ACTS = {
    "weight": "multiplies the loss of its row",
    "prompt_rejected": "is the prompt of the rejected answer",
    "chosen_weights": "weighs the tokens of chosen",
    "rejected_weights": "weighs the tokens of rejected",
    "completion_weights": "weighs the tokens of completion",
    "ref_chosen_logps": "is read with --reference columns",
    "tools": "is handed to the chat template of conversations",
    "chat_template_kwargs": "is handed to the chat template of conversations",
    "stage": "orders the rounds of --round-data stages",
}
_MEDIA = re.compile(
    r"(images?|imgs?|audios?|videos?|pictures?|photos?|pixel_values)"
    r"(_?(\d+|paths?|ur[li]s?|files?|names?|bytes|data|list|base64|b64))*",
    re.IGNORECASE,
)
# A text that is a file of pictures or sound, or one written out, whatever its column is called.
_FILE = re.compile(
    r"\S+\.(png|jpe?g|gif|webp|bmp|tiff?|heic|svg|wav|mp3|flac|ogg|m4a|mp4|webm|avi|mov|mkv)"
    r"|data:(image|audio|video)/\S+",
    re.IGNORECASE,
)
# What processors make of pictures and sound: numbers.
_PROCESSED = re.compile(
    r"(pixel_values|input_features|input_values|audio_values)(_\w+)?", re.IGNORECASE
)
# How a plain text begins that holds a dialogue, and so its prompt: "Human:", "### Instruction:",
# "<|im_start|>", "[INST]", after marks such as <s>.
_DIALOGUE = re.compile(
    r"\W*(<[^<>]*>\s*)*\W*("
    r"(human|user|question|q|system|instruction|prompt|inst)\W{0,3}[:>|\]\n]|"
    r"below is an instruction|(im_|start_)?(start|header_id|of_turn)\W{0,2}[>|])",
    re.IGNORECASE,
)
# Columns that hold a task whatever stands in them, be it a sum or a number.
_TASK = re.compile(
    r"(user_?|input_?)?(questions?|instructions?|query|queries|inputs?|problems?|prompts?|tasks?)",
    re.IGNORECASE,
)
# Numbers that only count or name rows.
_INDEX = re.compile(r"(.*_)?(ids?|idx|index|uuid|hash|seed)|__index_level_\d+__|", re.IGNORECASE)
_SHOWN = 8


# Columns of answers and of what belongs to them, which new answers to the prompts replace.
ANSWERS = (
    "chosen", "rejected", "completion", "completions", "responses", "label", "scores", "ranks",
    "finished", "chosen_score", "rejected_score", "ref_chosen_logps", "ref_rejected_logps",
    "chosen_weights", "rejected_weights", "completion_weights",
)  # fmt: skip


def check_there(renamed: Mapping[str, str], rows: Iterable[RawRow], source: str) -> None:
    """Refuses a column under another name that none of the rows has.

    Raises:
        ValueError: naming it and the columns that there are.
    """
    there = {str(name) for row in rows for name in row.data or ()}
    for name, column in renamed.items():
        if there and column not in there:
            raise ValueError(
                f"{source} has no column {column!r}, from which {name} is to be read (--column); "
                f"the columns found: {', '.join(map(repr, sorted(there)))}."
            )


def names_of(data: Mapping[str, Any]) -> str:
    """The columns of a row, and which of them hold nothing."""
    return ", ".join(f"{k!r}{' (null)' if v is None else ''}" for k, v in data.items())


class Beside:
    """Collects, over the rows of one data set, what is not read and what acts."""

    def __init__(
        self,
        layout: str,
        columns: Iterable[Column],
        roles: Mapping[str, Column],
        renamed: Mapping[str, str],
    ) -> None:
        self.layout = layout
        self.read = {*_READ[layout], *_EVERYWHERE, *renamed.values()}
        for column in (*columns, *roles.values()):
            name = column.column
            self.read |= {name, f"chosen_{name}", f"rejected_{name}", f"prompt_{name}"}
            self.read.add(f"{name}_weights")
        self.unread: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()  # of columns that hold numbers and are not read
        self.acting: Counter[str] = Counter()
        self.weights: list[float] = []
        self.near: dict[str, str] = {}  # a column that is not read -> the one it is nearly named as
        self._spelt = {_spelling(name): name for name in self.read}

    def add(
        self, where: str, data: Mapping[str, Any], *, implicit: bool, scored: bool = True
    ) -> None:
        """One row; `implicit`: its prompt is what its answers share, not `scored`: the answers of
        a list are stored best first.

        Raises:
            ValueError: it holds pictures or sound, or its question stands in a column that is not
                read while what its answers happen to share would be taken for the prompt, or its
                scores do while the order of its answers would be taken.
        """
        found = []
        for name, value in data.items():
            if value is None:
                continue
            if name in _ACTS:
                self.acting[name] += 1
            if name in self.read:
                continue
            if _holds_media(str(name), value):
                raise ValueError(
                    f"{where}: column {name!r} holds pictures, sound or other bytes, which are not "
                    "read here; a run on the text alone would train something else. "
                    "`prefkern train` reads pictures with --image-column; drop the column if the "
                    "text is enough."
                )
            if _has_text(value) or (_TASK.fullmatch(str(name)) and str(value).strip()):
                found.append(name)
            elif (meant := self._spelt.get(_spelling(str(name)))) is not None:
                self.near[str(name)] = meant
            elif _has_number(value) and not _INDEX.fullmatch(str(name)):
                self.numbers[str(name)] += 1
                if not scored and _one_each(value, data):
                    raise ValueError(
                        f"{where}: there is no column 'scores' (or 'ranks'), and column {name!r} "
                        "holds one number per answer, which is not read; the answers would be "
                        f"taken as stored best first. Name it: --column scores={name}, or drop it."
                    )
        self.unread.update(found)
        no_prompt = implicit and data.get("prompt") is None
        if found and no_prompt and not _asks(data.get("chosen")):
            raise ValueError(
                f"{where}: there is no column 'prompt', and the columns "
                f"{', '.join(map(repr, found[:_SHOWN]))} hold text that is not read; what the two "
                "answers share would be taken for the prompt. Name it: --column prompt="
                f"{found[-1] if 'question' not in found else 'question'}, or drop these columns."
            )

    def weigh(self, weights: Iterable[float]) -> None:
        """The weights of the rows that are kept."""
        self.weights = list(weights)

    def notes(self) -> list[str]:
        """What to say before the first step, a line each."""
        found = []
        for name, count in sorted(self.acting.items()):
            line = f"column {name!r} (in {count} rows) {_ACTS[name]}"
            if name == "weight" and self.weights:
                zeros = sum(w == 0.0 for w in self.weights)
                line += f": from {min(self.weights):g} to {max(self.weights):g}, 0 in {zeros}"
                line += "" if any(self.weights) else ", so nothing is trained"
            found.append(line)
        for what, counts in (
            ("text that is", self.unread), ("numbers that are", self.numbers)
        ):  # fmt: skip
            names = [repr(name) for name, _ in counts.most_common() if name not in self.near]
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            if names:
                found.append(f"columns with {what} not read: {', '.join(names[:_SHOWN])}{more}")
        for name, meant in sorted(self.near.items()):
            found.append(f"column {name!r} is not read; {meant!r} would be")
        return found


def beside_prompts(rows: Iterable[tuple[str, Mapping[str, Any]]], known: Iterable[str]) -> str:
    """What to say of the texts that stand beside prompts which are to be answered; empty: nothing.

    Args:
        rows: Where each stands, and its data under the names that are read.
        known: Further columns that are read.

    Raises:
        ValueError: a row holds pictures or sound.
    """
    beside = Beside("unpaired", (), {}, {})
    beside.read |= {*ANSWERS, *known}
    for where, data in rows:
        beside.add(where, data, implicit=False)
    names = [repr(name) for name, _ in beside.unread.most_common(_SHOWN)]
    told = f"columns with text that no prompt is given: {', '.join(names)}"
    return told if names else ""


def _asks(answer: Any) -> bool:
    """Whether an answer begins with what it answers, as it must where there is no prompt."""
    if isinstance(answer, str):
        return _DIALOGUE.match(answer) is not None
    first = answer[0] if isinstance(answer, list | tuple) and answer else None
    return not isinstance(first, Mapping) or first.get("role") not in ("assistant", "tool")


def _spelling(name: str) -> str:
    """A name without case, marks between its words and a plural."""
    return re.sub(r"[\W_]", "", name.lower()).rstrip("s")


def _holds_media(name: str, value: Any) -> bool:
    if isinstance(value, list | tuple):
        numbers = any(isinstance(item, float) for item in value)
        if (numbers and _MEDIA.fullmatch(name)) or (value and _PROCESSED.fullmatch(name)):
            return True
        return any(_holds_media(name, item) for item in value)
    if isinstance(value, bytes | bytearray) or hasattr(value, "getpixel"):
        return True
    if isinstance(value, Mapping):
        return any(_holds_media(str(key), item) for key, item in value.items()) or (
            bool(_MEDIA.fullmatch(name)) and any(v is not None for v in value.values())
        )
    # a number or a flag under such a name is about pictures and not one
    is_named = _MEDIA.fullmatch(name) and value
    return isinstance(value, str) and bool(is_named or _FILE.fullmatch(value))


def _one_each(value: Any, data: Mapping[str, Any]) -> bool:
    """Whether a value is one number for each answer of a list."""
    answers = data.get(list_column(data))
    return (
        isinstance(value, list | tuple)
        and isinstance(answers, list | tuple)
        and len(value) == len(answers)
        and all(isinstance(item, int | float) for item in value)
    )


def _has_number(value: Any) -> bool:
    """Whether a value is a number or holds one at its start."""
    if isinstance(value, list | tuple):
        return bool(value) and _has_number(value[0])
    return isinstance(value, int | float)


def _has_text(value: Any, depth: int = 4) -> bool:
    """Whether there is a letter in a value."""
    if isinstance(value, str):
        return any(character.isalpha() for character in value)
    if depth and isinstance(value, Mapping):
        return any(_has_text(item, depth - 1) for item in value.values())
    if depth and isinstance(value, list | tuple):
        return any(_has_text(item, depth - 1) for item in value)
    return False
