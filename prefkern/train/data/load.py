"""`Loader`: from a source to tokenised examples and a report of what was left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np

from .columns import Column, check_alike, read_columns, reorder
from .encode import Encoder
from .read import RawRow, raw_rows
from .records import LAYOUTS, Example, Loaded, SkipReport
from .rows import BadRow, ParsedRow, layout_of, parse_row

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
    for the next, equal scores equal. Data whose scores have several scales want "order"."""
    shuffle_lists: bool = True
    """False keeps the stored order, for losses in which it has a meaning."""
    labelled: bool = True
    """Whether single answers must have a label. Otherwise labels are read where all rows have
    them."""
    columns: Items[Column] = ()
    """Columns that losses read beside the texts."""
    roles: Mapping[str, Column] = field(default_factory=dict)
    """Answers of a pair beside chosen and rejected, and their columns."""

    def __post_init__(self) -> None:
        if self.layout != "auto" and self.layout not in LAYOUTS:
            raise ValueError(
                f"layout must be auto or one of {', '.join(LAYOUTS)}, got {self.layout!r}."
            )
        if self.list_labels not in ("scores", "order"):
            raise ValueError(f"list_labels must be 'scores' or 'order', got {self.list_labels!r}.")
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
        raw = raw_rows(source, split)
        layout, implicit, raw = _find_layout(raw, self.layout, limit, self.labelled)
        encoder, report = self._encoder(), SkipReport()
        examples: list[Example] = []
        for chunk in _chunks(raw, limit):
            # A damaged file is one entry of the report, not a row that was seen.
            report.rows += sum(row.kind != "damaged file" for row in chunk)
            good, bad = self._parsed(chunk, layout, implicit)
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
        if not examples:
            raise ValueError(f"no row of {_name(source)} can be used as {layout}: {report}")
        if layout == "unpaired" and any(example.desirable is None for example in examples):
            examples = [replace(example, desirable=None) for example in examples]
        if self.columns:
            rows = [(f"row {e.row}", e.columns, e.sequences[0].numbers) for e in examples]
            check_alike(rows, self.columns)
        return Loaded(examples, layout, report)

    def _encoder(self) -> Encoder:
        return Encoder(
            self.tokenizer,
            max_length=self.max_length,
            model_context=self.model_context,
            vocab_size=self.vocab_size,
            append_eos=self.append_eos,
            score_prompt=self.score_prompt,
        )

    def _parsed(
        self, chunk: list[RawRow], layout: str, implicit_prompt: bool
    ) -> tuple[list[tuple[RawRow, ParsedRow]], list[tuple[RawRow, BadRow]]]:
        """The rows of a chunk that can be used, and the reasons against the others."""
        good: list[tuple[RawRow, ParsedRow]] = []
        bad: list[tuple[RawRow, BadRow]] = []
        for row in chunk:
            if row.data is None:
                bad.append((row, BadRow("", row.kind, row.detail)))
                continue
            try:
                parsed = parse_row(
                    row.data, layout, list_labels=self.list_labels, roles=self.roles,
                    implicit_prompt=implicit_prompt, labelled=self.labelled,
                )  # fmt: skip
                parsed.columns = read_columns(
                    row.data, self.columns, parsed.places, layout == "lists"
                )
                good.append((row, parsed))
            except BadRow as reason:
                bad.append((row, reason))
        return good, bad

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


def _find_layout(
    raw: Iterator[RawRow], layout: str, limit: int | None, labelled: bool
) -> tuple[str, bool, Iterator[RawRow]]:
    """The layout, whether prompts are implicit, and the rows from the start again.

    Both are read off the first row that fits a layout (or the one asked for).
    """
    seen: list[RawRow] = []
    for row in raw:
        seen.append(row)
        found = layout_of(row.data, labelled=labelled) if row.data is not None else None
        if row.data is not None and found is not None and layout in ("auto", found):
            return found, row.data.get("prompt") is None, chain(seen, raw)
        if len(seen) == limit:
            break
    if layout != "auto":
        return layout, False, iter(seen)  # every row is going to be reported
    columns = next((", ".join(map(repr, row.data)) for row in seen if row.data), "none")
    first = next((f"; {row.where}: {row.detail}" for row in seen if row.kind), "")
    raise ValueError(
        f"no row of {len(seen)} fits a layout: pairs need chosen and rejected, unpaired rows "
        "completion and label, lists completions or responses; "
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
        if columns and example.columns:
            digest.update(repr(dict(example.columns)).encode())
        for seq in example.sequences if columns else ():
            for name, numbers in seq.numbers.items():
                digest.update(name.encode() + numbers.tobytes())
    return digest.hexdigest()
