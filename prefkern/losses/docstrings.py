"""Docstrings of losses: what a declaration adds to them, and how they are read back.

A hundred docstrings are completed in one go, so `complete` cuts and joins strings
as they stand, indented; `read` is for whoever asks afterwards.
"""

from __future__ import annotations

import functools
import inspect
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from .meanings import MEANINGS, RECORDS, SCORES, WITHOUT_REFERENCE

if TYPE_CHECKING:
    from .record import Loss

WIDTH = 100
THROUGH = "With preference_loss"  # arguments of the weight stage and of the likelihood term
_TITLES = ("Args", THROUGH, "Returns", "Raises")  # in this order
_SAYS_DEFAULT = re.compile(r"\b[Dd]efault (?!is )")
_RETURNS = {
    "pairwise": "Unreduced loss `[P]`",
    "pointwise": "Unreduced loss `[S]`",
    "listwise": "Unreduced loss `[G]`",
    "tokenwise": "Unreduced loss `[S]` fp64; an empty sequence gives 0",
    "diffusion": "Unreduced loss `[P]`",
}
_RAISES = (
    "ValueError: an argument out of its range or of another kind, a missing statistic, shapes "
)
_MORE_RAISES = {"diffusion": "that differ, a reference with gradient."}


class Document(NamedTuple):
    """The parts of a loss's docstring."""

    summary: str
    formula: str  # lines as they stand
    notes: list[str]  # paragraphs
    args: dict[str, str]  # name -> meaning, those of the weight stage and likelihood term included


# ---- completing ----------------------------------------------------------------------------------


def complete(record: Loss) -> str:
    """The loss's docstring with every argument, what it returns and what it raises."""
    doc = record.fn.__doc__ or ""
    indent = indent_of(doc)
    parts = cut(doc, indent)
    own = entries(parts["Args"], indent + 4)
    names = (*record.inputs.positional, *record.inputs.keywords)
    if spare := [name for name in own if name not in names]:
        raise ValueError(f"loss {record.name!r} documents {spare}, which it does not take.")
    told = {name: own.get(name) or _shared(name, record) for name in names}
    if silent := [name for name, meaning in told.items() if not meaning]:
        raise ValueError(f"loss {record.name!r} says nothing of its arguments {silent}.")
    more = {} if record.weights is record.supervised is None else _through(record)
    made = {
        "Args": _block(told, record, indent + 4),
        THROUGH: _block({k: v for k, v in more.items() if k not in told}, record, indent + 4),
        "Returns": parts["Returns"].rstrip() or wrapped(_returns(record), indent + 4),
        "Raises": parts["Raises"].rstrip() or _raises(record.family, indent + 4),
    }
    pad = " " * indent
    text = [parts[""].rstrip(), *(f"{pad}{k}:\n{v}" for k, v in made.items() if v)]
    if parts["end"]:
        text.append(parts["end"].rstrip())
    return "\n\n".join(text) + f"\n{pad}"


def indent_of(doc: str) -> int:
    """Spaces before the lines of a docstring, its first apart."""
    line = next((line for line in doc.split("\n", 3)[1:] if line.strip()), "    ")
    return len(line) - len(line.lstrip())


def cut(doc: str, indent: int) -> dict[str, str]:
    """The parts of a docstring by title; "" is what stands before the first, "end" an example."""
    pad = " " * indent
    doc, mark, end = doc.partition(f"\n{pad}>>> ")
    found = {"end": f"{pad}>>> {end}" if mark else ""}
    for title in reversed(_TITLES):
        doc, _, found[title] = doc.partition(f"\n{pad}{title}:\n")
    return {**found, "": doc}


def entries(block: str, indent: int) -> dict[str, str]:
    """name -> meaning of a section of arguments; names may share one."""
    found: dict[str, str] = {}
    _, *parts = _entry(indent).split(block)  # names, meaning, names, meaning ...
    for names, meaning in zip(parts[::2], parts[1::2], strict=True):
        found |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return found


@functools.cache
def _entry(indent: int) -> re.Pattern[str]:
    return re.compile(rf"^ {{{indent}}}(\w[\w, ]*): ", re.M)


def _shared(name: str, record: Loss) -> str:
    """The meaning that the loss shares with others; "" where it has none."""
    if name == "scores":
        return SCORES[record.score]
    if name not in RECORDS:
        own = {} if record.needs_reference else WITHOUT_REFERENCE
        return own.get(name) or MEANINGS.get(name, "")
    reads = record.reads if isinstance(record.reads, tuple) else record.reads()
    fields = [field.partition(":")[0] for field in reads]
    if record.reference is True:
        fields.insert(fields.index("logp") + 1 if "logp" in fields else 0, "ref_logp")
    what = RECORDS[name] if record.weights is None else "Weighted s" + RECORDS[name][1:]
    return f"{what}; needs {', '.join(f'`{field}`' for field in fields)}."


def _through(record: Loss) -> dict[str, str]:
    """Meanings of the arguments that only preference_loss takes."""
    found: dict[str, str] = {}
    if record.weights is not None:
        doc = record.weights.__doc__ or ""
        of_stage = entries(cut(doc, indent_of(doc))["Args"], indent_of(doc) + 4)
        found = {k: v for k, v in of_stage.items() if k in record.inputs.arguments}
    if record.supervised is not None:
        found[record.supervised.argument] = (
            "Weight of the likelihood term, which preference_loss adds."
        )
    return found


def _block(told: dict[str, str], record: Loss, indent: int) -> str:
    """The entries; neighbours that share meaning and default share an entry."""
    groups: list[tuple[list[str], str]] = []
    for name, meaning in told.items():
        parameter = record.inputs.arguments.get(name)
        if parameter is not None and parameter.default is not parameter.empty:
            meaning = _with_default(meaning, default_of(parameter))
        if groups and groups[-1][1] == meaning:
            groups[-1][0].append(name)
        else:
            groups.append(([name], meaning))
    return "\n".join(wrapped(f"{', '.join(names)}: {meaning}", indent) for names, meaning in groups)


def _with_default(meaning: str, default: str) -> str:
    said = "efault" in meaning and _SAYS_DEFAULT.search(meaning)
    return meaning if said else f"{meaning} Default {default}."


def default_of(parameter: inspect.Parameter) -> str:
    """The default as it is written in code; a long number to six digits."""
    value: Any = parameter.default
    return repr(round(value, 6) if isinstance(value, float) else value)


def _returns(record: Loss) -> str:
    said = _RETURNS[record.family]
    if record.supervised is None:
        return said + "."
    weight = record.supervised
    times = f", times {weight.scale}" if weight.scale else ""
    return (
        f"{said}, without the likelihood term (weight `{weight.argument}`, default "
        f"{weight.default:g}{times})."
    )


@functools.cache
def _raises(family: str, indent: int) -> str:
    return wrapped(_RAISES + _MORE_RAISES.get(family, "that differ."), indent)


@functools.cache
def wrapped(text: str, indent: int) -> str:
    """text in lines of at most WIDTH, the first indented by `indent`, the rest by 4 more."""
    pad, lines = " " * indent, []
    while len(pad) + len(text) > WIDTH:
        at = text.rfind(" ", 0, WIDTH - len(pad) + 1)
        lines.append(pad + text[:at])
        pad, text = " " * (indent + 4), text[at + 1 :]
    return "\n".join([*lines, pad + text])


# ---- reading -------------------------------------------------------------------------------------


def meanings(record: Loss) -> dict[str, str]:
    """name -> meaning of everything a call of the loss may give."""
    return read(record.fn.__doc__ or "").args


def read(doc: str) -> Document:
    """Splits a docstring into summary, formula (the paragraph that defines l), notes, arguments."""
    parts = cut(inspect.cleandoc(doc), 0)
    args = {**entries(parts[THROUGH], 4), **entries(parts["Args"], 4)}
    summary, *paragraphs = [p.strip("\n") for p in parts[""].split("\n\n")]
    formula, notes = "", []
    for i, paragraph in enumerate(paragraphs):
        if not formula and re.search(r"^\s*(level \S+\s+)?l(_\w+)? = ", paragraph, re.M):
            formula = paragraph
        elif formula and i and _continues(paragraph):
            formula += "\n\n" + paragraph
        else:
            notes.append(paragraph)
    return Document(" ".join(summary.split()), formula, notes, args)


def _continues(paragraph: str) -> bool:
    """True for a paragraph that goes on defining symbols: its first line is an equation."""
    return bool(re.match(r"^(with )?[\w()]+ = [^.]*$", paragraph.split("\n")[0]))
