"""`Loader`: from a source to tokenised examples and a report of what was left out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...prep.cells import is_scored
from . import unread
from .columns import Column, check_alike, read_columns, reorder
from .encode import Encoder
from .read import RawRow, folder_of, raw_rows
from .records import LAYOUTS, Example, Loaded, SkipReport
from .rows import BadRow, ParsedRow, layout_of, parse_row
from .vision import Vision

CHUNK = 256  # rows per tokenizer call, enough for its threads


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Reads, checks and tokenises preference data sets; the same options give the same result.

    A row that cannot be used never stops the run: it is counted and reported with its line, column
    and reason. The answers of a list are shuffled, because rank-based losses start from equal
    scores, where the order of storage would decide.
    """

    tokenizer: Any
    """A transformers tokenizer; see `Encoder`."""
    layout: str = "auto"
    """"pairs", "lists", "unpaired", or "auto": that of the first row that fits one."""
    max_length: int | None = 1024
    """Tokens kept of prompt + response, from the start. Rows whose prompt alone fills it are left
    out. None keeps all, and leaves out rows beyond `model_context`."""
    model_context: int | None = None
    """Tokens the model can read."""
    vocab_size: int | None = None
    """Rows of the model's embedding, checked against the ids."""
    strict: bool = False
    """Raise at the first row that cannot be used."""
    seed: int = 42
    """Seed of the order of the answers in a list; each row's order depends on the seed and the row
    number alone."""
    append_eos: bool = True
    """Append EOS to plain-text responses."""
    score_prompt: bool = False
    """Score the prompt's tokens too, all but the very first."""
    list_labels: str = "scores"
    """"scores" as given (ranks count from the worst, 0), or "order": 0 for the worst of the list, 1
    for the next, equal scores equal. Data whose scores have several scales want "order". "auto" is
    "scores", and "order" for a data set with labels outside `label_range`, which is noted."""
    label_range: tuple[float, float] | None = None
    """Labels that the losses were made for; None: any."""
    shuffle_lists: bool = True
    """False keeps the stored order, for losses in which it has a meaning."""
    labelled: bool = True
    """Whether single answers must have a label. Otherwise labels are read where all rows have
    them."""
    may_be_empty: bool = False
    """Whether a source may have no row that can be used."""
    columns: Items[Column] = ()
    """Columns that losses read beside the texts."""
    roles: Mapping[str, Column] = field(default_factory=dict)
    """Answers of a pair beside chosen and rejected, and their columns."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Text columns under other names: `unread.TEXTS` -> column."""
    vision: Vision | None = None
    """Reads the pictures of every row; None: texts alone."""

    def __post_init__(self) -> None:
        if self.layout != "auto" and self.layout not in LAYOUTS:
            raise ValueError(
                f"layout must be auto or one of {', '.join(LAYOUTS)}, got {self.layout!r}."
            )
        if self.list_labels not in ("auto", "scores", "order"):
            raise ValueError(
                f"list_labels must be 'auto', 'scores' or 'order', got {self.list_labels!r}."
            )
        self._encoder()

    def load(self, source: Any, split: str | None = None, limit: int | None = None) -> Loaded:
        """The examples of a source, its layout, and what was left out.

        Args:
            source, split: See `raw_rows`.
            limit: Read at most this many rows.

        Raises:
            ValueError: The source cannot be opened, its columns fit no layout, no row can be used,
                a row cannot be used and `strict` is set, or the options contradict each other.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}.")
        raw = self._renamed(raw_rows(source, split), source)
        form, raw = _find_form(raw, self.layout, limit, self.labelled, _name(source))
        layout, implicit = form.layout, form.implicit and form.layout == "pairs"
        encoder, report = self._encoder(), SkipReport()
        beside = unread.Beside(layout, self.columns, self.roles, self.renamed)
        if self.vision is not None:
            beside.read |= self.vision.columns(
                {"rejected", *self.roles} if layout == "pairs" else ()
            )
        folder = folder_of(source)
        examples: list[Example] = []
        for chunk in _chunks(raw, limit):
            # A damaged file is one entry of the report, not a row that was seen.
            report.rows += sum(row.kind != "damaged file" for row in chunk)
            for row in chunk:
                if row.data is not None:
                    beside.add(row.where, row.data, implicit=implicit, scored=form.is_scored)
            good, bad = self._parsed(chunk, form, folder)
            encoded = encoder.encode([(row.row, parsed) for row, parsed in good])
            for (row, _), result in zip(good, encoded, strict=True):
                if isinstance(result, BadRow):
                    bad.append((row, result))
                else:
                    examples.append(self._shuffled(result))
            # in the order of the rows, though tokenising a chunk comes after parsing it
            for row, why in sorted(bad, key=lambda item: item[0].row):
                _report(report, row, why, self.strict)
        report.kept = len(examples)
        report.truncated = sum(example.truncated for example in examples)
        beside.weigh(example.weight for example in examples)
        report.notes += [f"{count} {note}" for note, count in encoder.notes.items()]
        report.notes += beside.notes()
        if not form.is_scored:
            report.notes.append("answers without scores (or ranks) are taken as stored best first")
        if not examples and not self.may_be_empty:
            raise ValueError(f"no row of {_name(source)} can be used as {layout}: {report}")
        examples = self._graded(examples, report)
        if layout == "unpaired" and any(example.desirable is None for example in examples):
            examples = [replace(example, desirable=None) for example in examples]
        if self.columns and examples:
            rows = [(f"row {e.row}", e.columns, e.sequences[0].numbers) for e in examples]
            check_alike(rows, self.columns)
        return Loaded(examples, layout, report)

    def _renamed(self, rows: Iterator[RawRow], source: Any) -> Iterator[RawRow]:
        """The rows with their text columns under the names that are read.

        Raises:
            ValueError: the first rows have no such column.
        """
        if not self.renamed:
            yield from rows
            return
        first = list(islice(rows, CHUNK))
        unread.check_there(self.renamed, first, _name(source))
        for row in chain(first, rows):
            if row.data is not None:
                moved = {name: row.data.get(column) for name, column in self.renamed.items()}
                rest = {k: v for k, v in row.data.items() if k not in self.renamed.values()}
                row = replace(row, data={**rest, **moved})
            yield row

    def _graded(self, examples: list[Example], report: SkipReport) -> list[Example]:
        """Under "auto", only the order of labels that the losses were not made for, and a note.

        Raises:
            ValueError: their order is none that the losses were made for either.
        """
        given = [label for example in examples for label in example.relevance or ()]
        labels = [label for label in given if not math.isnan(label)]
        if self.label_range is None or not labels:
            return examples
        low, high = self.label_range
        if low <= min(labels) and max(labels) <= high:
            return examples
        outside = f"labels from {min(labels):g} to {max(labels):g} are not on the scale "
        outside += f"from {low:g} to {high:g}" if math.isfinite(high) else f"from {low:g} on"
        outside += " that the loss is made for"
        if high < 2:  # what shares or probabilities are, no order is
            raise ValueError(f"{outside}; bring the column scores to it.")
        if self.list_labels != "auto":
            return examples
        report.ordered = True
        report.notes.append(
            f"{outside}, so only their order is used; --list-labels scores takes them as they are, "
            "--list-labels order says it"
        )
        return [
            replace(example, relevance=_ranks(example.relevance))
            for example in examples
            if example.relevance is not None
        ]

    def _encoder(self) -> Encoder:
        return Encoder(
            self.tokenizer,
            max_length=self.max_length,
            model_context=self.model_context,
            vocab_size=self.vocab_size,
            append_eos=self.append_eos,
            score_prompt=self.score_prompt,
            vision=self.vision,
        )

    def _parsed(
        self, chunk: list[RawRow], form: Form, folder: Path
    ) -> tuple[list[tuple[RawRow, ParsedRow]], list[tuple[RawRow, BadRow]]]:
        """The rows of a chunk that can be used, and the reasons against the others."""
        good: list[tuple[RawRow, ParsedRow]] = []
        bad: list[tuple[RawRow, BadRow]] = []
        for row in chunk:
            if row.data is None:
                bad.append((row, BadRow("", row.kind, row.detail)))
                continue
            try:
                is_list = form.layout == "lists"
                if is_list and is_scored(row.data) != form.scored:
                    here, first = ("has", "none") if form.scored is False else ("lacks", "some")
                    raise BadRow(
                        "scores", "in some rows only",
                        f"the row {here} scores (or ranks) where the first row has {first}; "
                        "answers without are stored best first",
                    )  # fmt: skip
                parsed = self._parsed_row(row.data, form, folder)
                parsed.columns = read_columns(row.data, self.columns, parsed.places, is_list)
                good.append((row, parsed))
            except BadRow as reason:
                bad.append((row, reason))
        return good, bad

    def _parsed_row(self, data: Mapping[str, Any], form: Form, folder: Path) -> ParsedRow:
        """One row with its pictures.

        Raises:
            BadRow: it cannot be used.
        """
        vision, pairs = self.vision, form.layout == "pairs"
        own: frozenset[str] = frozenset()
        if vision is not None:
            data = vision.marked(data)
            vision.check(data, self.roles.keys() & {"cond"} if pairs else ())
            own = vision.own(data, {"rejected", *self.roles} if pairs else ())
        parsed = parse_row(
            data, form.layout, list_labels=self.list_labels, roles=self.roles,
            implicit_prompt=form.implicit, labelled=self.labelled, pictured=own,
        )  # fmt: skip
        if vision is not None:
            vision.read(parsed, data, folder)
        return parsed

    def _shuffled(self, example: Example) -> Example:
        """A list in the order that its row and the seed give; anything else as it is."""
        if example.relevance is None or not self.shuffle_lists:
            return example
        count = len(example.sequences)
        order = np.random.default_rng([self.seed, example.row]).permutation(count).tolist()
        return replace(
            example,
            sequences=tuple(example.sequences[i] for i in order),
            relevance=tuple(example.relevance[i] for i in order),
            columns=reorder(example.columns, order),
        )


class Form(NamedTuple):
    """What holds for all rows of a data set."""

    layout: str
    implicit: bool  # pairs without a prompt of their own
    scored: bool  # lists whose answers have scores or ranks

    @property
    def is_scored(self) -> bool:
        """False: the order of a list's answers is all that says which is better."""
        return self.scored or self.layout != "lists"


def _find_form(
    raw: Iterator[RawRow], layout: str, limit: int | None, labelled: bool, name: str
) -> tuple[Form, Iterator[RawRow]]:
    """The form of a data set, read off the first row that fits a layout (or the one asked for), and
    the rows from the start again."""
    seen: list[RawRow] = []
    for row in raw:
        seen.append(row)
        found = layout_of(row.data, labelled=labelled) if row.data is not None else None
        if row.data is not None and found is not None and layout in ("auto", found):
            form = Form(found, row.data.get("prompt") is None, is_scored(row.data))
            return form, chain(seen, raw)
        if len(seen) == limit:
            break
    if not seen:
        raise ValueError(f"{name} holds no rows.")
    if layout != "auto":
        return Form(layout, False, False), iter(seen)  # every row is going to be reported
    if all(row.data is None for row in seen):
        raise ValueError(
            f"{name}: none of {len(seen)} rows can be read: {seen[0].where}: {seen[0].detail}. A "
            "file of JSON lines is UTF-8 with a whole object on every line."
        )
    columns = next((unread.names_of(row.data) for row in seen if row.data), "none")
    first = next((f"; {row.where}: {row.detail}" for row in seen if row.kind), "")
    raise ValueError(
        f"{name}: no row of {len(seen)} fits a layout: pairs need chosen and rejected, unpaired "
        "rows completion and label, lists completions or responses; "
        f"the columns found: {columns}{first}."
    )


def _chunks(raw: Iterator[RawRow], limit: int | None) -> Iterator[list[RawRow]]:
    chunk: list[RawRow] = []
    for count, row in enumerate(raw):
        if limit is not None and count == limit:
            break
        chunk.append(row)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _ranks(labels: tuple[float, ...]) -> tuple[float, ...]:
    """0 for the lowest label, 1 for the next, equal ones equal; NaN stays, which ranks nothing."""
    order = sorted({label for label in labels if not math.isnan(label)})
    return tuple(x if math.isnan(x) else float(order.index(x)) for x in labels)


def _report(report: SkipReport, row: RawRow, bad: BadRow, strict: bool) -> None:
    column = f" column '{bad.column}'" if bad.column else ""
    message = f"{row.where}{column}: {bad.detail}"
    if strict:
        raise ValueError(f"{message} (strict: every row must be usable).") from bad
    report.add(f"{column.strip()}: {bad.kind}" if column else bad.kind, message)


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str) or hasattr(source, "__fspath__") else "the data"


def length_baseline(examples: list[Example]) -> float:
    """Share of preferred-over-other pairs in which the preferred answer has more tokens.

    Equal lengths count one half. In a list every two answers with different relevance are a pair.
    An accuracy means something only where it differs from this number and from one minus it.

    Returns:
        The share, NaN where nothing is compared (unpaired data).
    """
    wins = pairs = 0.0
    for example in examples:
        lengths = [seq.length for seq in example.sequences]
        relevance = example.relevance or (1.0, 0.0)
        for i, better in enumerate(relevance):
            for j, worse in enumerate(relevance):
                if len(lengths) > 1 and better > worse:
                    pairs += 1
                    wins += (lengths[i] > lengths[j]) + 0.5 * (lengths[i] == lengths[j])
    return wins / pairs if pairs else float("nan")


def data_hash(examples: list[Example], *, columns: bool = False) -> str:
    """SHA-256 over everything that a log-probability can depend on, in order; with `columns`, also
    over the extra columns that a loss reads."""
    digest = hashlib.sha256()
    for example in examples:
        labels = example.relevance
        if example.desirable is not None:
            labels = (float(example.desirable),)
        digest.update(repr((len(example.sequences), labels, example.weight)).encode())
        for seq in example.sequences:
            digest.update(np.array([len(seq.input_ids), seq.completion_start], np.int64).tobytes())
            digest.update(seq.input_ids.tobytes())
            if seq.token_weights is not None:
                digest.update(seq.token_weights.tobytes())
            for picture in seq.pictures:
                digest.update(picture.digest)
        if columns and example.columns:
            digest.update(repr(dict(example.columns)).encode())
        for seq in example.sequences if columns else ():
            for name, numbers in seq.numbers.items():
                digest.update(name.encode() + numbers.tobytes())
    return digest.hexdigest()


def load_examples(rows: Any, *, tokenizer: Any, split: str | None = None, **options: Any) -> Loaded:
    """The examples of any source with a tokenizer alone: `Loader(...).load(...)` in one call.

    Args:
        rows, split: See `raw_rows`.
        tokenizer: A transformers tokenizer.
        options: Fields of `Loader`, such as max_length.

    Raises:
        ValueError: as `Loader` and `Loader.load`.
    """
    return Loader(tokenizer=tokenizer, **options).load(rows, split)
