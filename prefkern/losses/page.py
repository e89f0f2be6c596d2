"""docs/losses.md, made from signatures, docstrings and records: `prefkern losses --markdown`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ..stats import TWO_MODEL_STATS, SeqStats
from .advice import ADVICE
from .binding import ALIASES, arguments, required
from .docstrings import Document, default_of, read
from .record import LOSSES, Loss, Supervised

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
    "listwise": "`(scores, relevance, cu_groups, *, ...) -> [G]` on ragged lists.",
    "tokenwise": "`(tokens: TokenStats, cu_seqlens, *, ...)`: not linear in the tokens.",
    "diffusion": "Per-sample prediction errors of `prefkern.error_sum`; not for `preference_loss`.",
}
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

The line of each entry runs on what this block makes, beside the tensors that the entry names:

```python
import torch

import prefkern

hidden = torch.randn(6, 5, 16, requires_grad=True)  # last hidden states of six answers [B, T, D]
head = torch.nn.Linear(16, 100, bias=False)
targets = torch.randint(0, 100, (6, 5))  # shifted labels, -100 where not scored
ref_hidden = torch.randn(6, 5, 16)  # of the reference, or the teacher, for the same tokens
desirable = torch.tensor([True, False, True, True, False, False])
relevance = torch.tensor([2.0, 0.0, 1.0, 0.5, 0.0, 3.0])  # higher is better
cu_groups = torch.tensor([0, 3, 6], dtype=torch.int32)  # two lists of three
cu_pairs = torch.tensor([0, 2, 4, 6], dtype=torch.int32)  # or three pairs
chosen_err, rejected_err = torch.rand(2, 3).requires_grad_()  # of prefkern.error_sum
ref_chosen_err, ref_rejected_err = torch.rand(2, 3)
```
"""


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


def _entry(record: Loss) -> Iterator[str]:
    text = read(inspect.getdoc(record.fn) or "")
    yield f"### {record.name}"
    yield ""
    yield text.summary
    yield ""
    yield from ("```text", text.formula, "```", "")
    for note in text.notes:
        yield from (_prose(note), "")
    advice = ADVICE[record.name]
    yield f"* **When**: {_named(advice.when)}"
    if advice.relations:
        yield f"* **Relations**: {_named(advice.relations)}"
    status = record.status
    yield f"* **Status**: {status.replace('provisional', '**provisional**', 1)}"
    yield f"* **Source**: {_linked(record.source)}"
    yield f"* **Needs**: {'; '.join(_needs(record))}"
    if record.supervised is not None:
        yield f"* **Likelihood term**: {_likelihood(record.supervised)}"
    if record.weights is not None:
        yield f"* **Token weights**: `{_path(record.weights)}`"
    yield ""
    if record.weights is not None:
        yield from _stage(record.weights)
    yield from _table(record, text)
    yield from ("", "```text", line(record), "```")


def line(record: Loss) -> str:
    """One call of the loss, on the names of the page's first block and those it requires."""
    filled = {"scored", *SeqStats._fields}  # from the batch's own statistics
    tensors = [name for name in required(record) if name not in filled]
    if record.family == "diffusion":
        given = [*record.inputs.positional, *(f"{name}={name}" for name in tensors)]
        return f"prefkern.losses.{record.name}({', '.join(given)})"
    names = dict.fromkeys(("relevance", "cu_groups") if record.family == "listwise" else ())
    if record.needs_reference or set(record.stats) & set(TWO_MODEL_STATS):
        names = {"ref_hidden": None, **names}
    if "ev" in record.stats:
        names |= dict.fromkeys(("aux_hidden", "aux_head"))
    names |= dict.fromkeys(tensors)
    if "cu_segments" in arguments(record):  # or step_index, one of the two
        names["step_index"] = None
    groups = read(inspect.getdoc(record.fn) or "").args.get("cu_groups", "")
    values = {"cu_groups": "cu_pairs"} if groups.startswith("`[P+1]`") else {}
    named = (f"{n}={values.get(n, n)}" for n in names)
    given = ["hidden", "head", "targets", f'loss="{record.name}"', *named]
    return f"prefkern.preference_loss({', '.join(given)})"


def _named(text: str) -> str:
    """Names of losses in backticks as links to their entries."""
    return re.sub(r"`(\w+)`", r"[`\1`](#\1)", text)


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
        free = f", not for {record.reference}=0" if isinstance(record.reference, str) else ""
        yield "a reference" + free
    else:
        yield "no reference"
    if record.stats:
        more = "" if isinstance(record.reads, tuple) else " (or as the arguments say)"
        yield "statistics " + ", ".join(f"`{s}`" for s in record.stats) + more
    if record.rows not in ((), ("chosen", "rejected")):
        yield "rows " + ", ".join(record.rows)
    if record.family == "listwise":
        yield f"scores are `{record.score}`"
    if record.items == "scored_tokens":
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
    rows = [
        f"| `{name}` | {_default(record, name, parameter)} | {_meaning(text, name, parameter)} |"
        for name, parameter in arguments(record).items()
        if name != "backend"
    ]
    return ["| argument | default | meaning |", "|---|---|---|", *rows] if rows else []


def _default(record: Loss, name: str, parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty or name in required(record):
        return "required"
    return f"`{default_of(parameter)}`"


def _meaning(text: Document, name: str, parameter: inspect.Parameter) -> str:
    """The meaning as a cell; its default has a column of its own."""
    return _cell(text.args[name].removesuffix(f" Default {default_of(parameter)}."))


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
