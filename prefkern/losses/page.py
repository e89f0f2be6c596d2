"""docs/losses.md, made from signatures, docstrings and records: `prefkern losses --markdown`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from . import ALIASES, LOSSES, arguments, required
from .record import Loss, Supervised

FAMILY_TITLES = {
    "pairwise": "Pairs: a chosen and a rejected answer",
    "pointwise": "Single answers",
    "listwise": "Lists of answers",
    "tokenwise": "Token by token",
    "diffusion": "Diffusion and flow models",
}
_SIGNATURES = {
    "pairwise": "`(chosen: SeqStats, rejected: SeqStats, *, ...) -> [P]`, through "
    '`preference_loss` with neighbouring sequences (or `layout="halves"`).',
    "pointwise": "`(seq: SeqStats, *, ...) -> [S]`; `desirable` [S] is bool, True for a good one.",
    "listwise": "`(scores, labels, cu_groups, *, ...) -> [G]` on ragged lists.",
    "tokenwise": "`(tokens: TokenStats, cu_seqlens, *, ...)`: not linear in the tokens.",
    "diffusion": "Per-sample prediction errors of `prefkern.error_sum`; not for `preference_loss`.",
}
_SECTIONS = ("Args", "Returns", "Raises", "Warns")
_HEAD = """\
# Losses

<!-- Made by `prefkern losses --markdown`; a test compares it with the code. Edit docstrings. -->

Every loss of `prefkern.LOSSES`: as `prefkern.preference_loss(loss="name", ...)`, in the trainer
(`prefkern train --loss name`), or alone, `prefkern.losses.name(...)`, on log-probabilities from
elsewhere. `prefkern losses name` prints one of them.

logp is the summed log-probability of a sequence, logratio that sum less the reference's, mean_ the
same per token, fkl the summed KL(reference || policy), rkl the reverse; softplus(x) = log(1 + e^x).
Losses are per item; `preference_loss` divides by the number of pairs, lists or sequences unless the
entry says otherwise. "Checked" and "executed" mean that numbers were compared with the named code;
results of a loss marked **provisional** must not be reported as the method's.
"""


class Document(NamedTuple):
    """The parts of a loss's docstring."""

    summary: str
    formula: str  # lines as they stand
    notes: list[str]  # paragraphs
    args: dict[str, str]  # name -> meaning


def page() -> str:
    """The whole page."""
    lines = [_HEAD, "## Contents", ""]
    families = {f: [r for r in LOSSES.values() if r.family == f] for f in FAMILY_TITLES}
    for family, records in families.items():
        links = ", ".join(f"[{r.name}](#{r.name})" for r in records)
        lines += [f"* [{FAMILY_TITLES[family]}](#{_anchor(FAMILY_TITLES[family])}): {links}"]
    lines += ["* [Names of TRL](#names-of-trl)", ""]
    for family, records in families.items():
        lines += [f"## {FAMILY_TITLES[family]}", "", _SIGNATURES[family], ""]
        for record in records:
            lines += [*_entry(record), ""]
    lines += ["## Names of TRL", "", "| loss_type | here |", "|---|---|"]
    for alias, (name, fixed) in ALIASES.items():
        call = ", ".join(f"{k}={v!r}" for k, v in fixed.items())
        lines.append(f"| `{alias}` | [`{name}`](#{name}){f' with `{call}`' if call else ''} |")
    return "\n".join(lines) + "\n"


def read(text: str) -> Document:
    """Splits a docstring into summary, formula (the paragraph that defines l), notes, arguments."""
    body, meanings = text, {}
    for name in _SECTIONS:
        at = re.search(rf"^{name}:\n", body, re.M)
        if at is None:
            continue
        if name == "Args":
            rest = re.split(r"^\w+:\n", body[at.end() :], maxsplit=1, flags=re.M)[0]
            meanings = _arguments_of(rest)
        body = body[: at.start()]
        break
    summary, *paragraphs = [p.strip("\n") for p in body.strip().split("\n\n")]
    formula, notes = "", []
    for i, paragraph in enumerate(paragraphs):
        if not formula and re.search(r"^\s*(level \S+\s+)?l(_\w+)? = ", paragraph, re.M):
            formula = paragraph
        elif formula and i and _continues(paragraph):
            formula += "\n\n" + paragraph
        else:
            notes.append(paragraph)
    return Document(" ".join(summary.split()), formula, notes, meanings)


def _continues(paragraph: str) -> bool:
    """True for a paragraph that goes on defining symbols: its first line is an equation."""
    return bool(re.match(r"^(with )?[\w()]+ = [^.]*$", paragraph.split("\n")[0]))


def _arguments_of(block: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for names, meaning in re.findall(r"^ {4}([\w, ]+): ((?:.|\n(?! {4}\S))*)", block, re.M):
        for name in names.split(","):
            found[name.strip()] = " ".join(meaning.split())
    return found


def _entry(record: Loss) -> Iterator[str]:
    text = read(inspect.getdoc(record.fn) or "")
    yield f"### {record.name}"
    yield ""
    yield text.summary
    yield ""
    yield from ("```text", text.formula, "```", "")
    for note in text.notes:
        yield from (_prose(note), "")
    status = record.status
    yield f"* **Status**: {status.replace('provisional', '**provisional**', 1)}"
    yield f"* **Source**: {_linked(record.source)}"
    yield f"* **Needs**: {'; '.join(_needs(record))}"
    if record.supervised is not None:
        yield f"* **Likelihood term**: {_likelihood(record.supervised)}"
    if record.weights is not None:
        yield f"* **Token weights**: `{_path(record.weights.fn)}`"
    yield ""
    if record.weights is not None:
        yield from _stage(record.weights.fn)
    yield from _table(record, text)


def _stage(fn: Any) -> Iterator[str]:
    """What a weight stage says of itself: its summary and the paragraph that defines w."""
    text = read(inspect.getdoc(fn) or "")
    yield f"Token weights: {text.summary}"
    yield ""
    definition = next((note for note in text.notes if " = " in note), "")
    if definition:
        yield from ("```text", definition, "```", "")


def _needs(record: Loss) -> Iterator[str]:
    if record.needs_reference:
        free = f", not for {record.reference_weight}=0" if record.reference_weight else ""
        yield "a reference" + free
    else:
        yield "no reference"
    if record.stats:
        more = " (or as the arguments say)" if record.stats_for else ""
        yield "statistics " + ", ".join(f"`{s}`" for s in record.stats) + more
    if record.rows != ("chosen", "rejected"):
        yield "rows " + ", ".join(record.rows)
    if record.family == "listwise":
        yield f"scores are `{record.score}`"
    if record.items:
        yield "divided by the number of " + record.items.replace("_", " ")
    if tensors := required(record):
        yield "arguments " + ", ".join(f"`{n}`" for n in tensors)
    if record.update is not None:
        yield f"a state between batches (`{_path(record.update)}`)"


def _likelihood(spec: Supervised) -> str:
    how = {
        "token": "per token of the batch",
        "seq": "per token of each sequence",
        "sum": "summed over each sequence",
    }[spec.mode]
    scale = f" {spec.scale}" if spec.scale else ""
    return f"+ `{spec.argument}`{scale} (default {spec.default:g}) NLL({spec.rows}), {how}"


def _table(record: Loss, text: Document) -> Iterable[str]:
    meanings = dict(text.args)
    if record.weights is not None:
        stage = read(inspect.getdoc(record.weights.fn) or "").args
        meanings = {**stage, **meanings}
    if record.supervised is not None:
        meanings.setdefault(
            record.supervised.argument, "Weight of the likelihood term, added by `preference_loss`."
        )
    rows = [
        f"| `{name}` | {_default(record, name, parameter)} | {_cell(meanings.get(name, ''))} |"
        for name, parameter in arguments(record).items()
        if name != "backend"
    ]
    return ["| argument | default | meaning |", "|---|---|---|", *rows] if rows else []


def _default(record: Loss, name: str, parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty or name in required(record):
        return "required"
    value: Any = parameter.default
    return f"`{round(value, 6) if isinstance(value, float) else value!r}`"


def _prose(text: str) -> str:
    """A paragraph as Markdown: what would be read as emphasis is escaped."""
    return re.sub(r"(?<![`\w])([*_<])", r"\\\1", " ".join(text.split())).replace("||", "\\|\\|")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


def _path(fn: Any) -> str:
    return f"{fn.__module__}.{fn.__qualname__}"


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
