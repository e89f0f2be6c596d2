"""`load_examples`: from a source to tokenised examples and a report of what was left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from .encode import Encoded, Encoder
from .extra import Extra, check_alike, read_extras, reorder
from .read import RawRow, read_rows
from .records import LAYOUTS, Example, Loaded, SkipReport
from .rows import BadRow, ParsedRow, layout_of, parse_row

CHUNK = 256  # rows per tokenizer call, enough for its threads


def load_examples(
    source: Any,
    *,
    tokenizer: Any,
    split: str | None = None,
    layout: str = "auto",
    max_length: int | None = 1024,
    model_context: int | None = None,
    vocab_size: int | None = None,
    strict: bool = False,
    seed: int = 42,
    limit: int | None = None,
    append_eos: bool = True,
    list_labels: str = "scores",
    extras: Items[Extra] = (),
    roles: Mapping[str, Extra] | None = None,
    labelled: bool = True,
    shuffle_lists: bool = True,
    score_prompt: bool = False,
) -> Loaded:
    """Reads, checks and tokenises a preference data set; the same arguments give the same result.

    A row that cannot be used never stops the run: it is counted and reported with its line, column
    and reason. The answers of a list are shuffled, because rank-based losses start from equal
    scores, where the order of storage would decide.

    Args:
        source: See `read_rows`.
        tokenizer: A transformers tokenizer; see `Encoder`.
        split: See `read_rows`.
        layout: "pairs", "lists", "unpaired", or "auto": that of the first row that fits one.
        max_length: Tokens kept of prompt + response, from the start. Rows whose prompt alone fills
            it are left out. None keeps all, and leaves out rows beyond `model_context`.
        model_context: Tokens the model can read.
        vocab_size: Rows of the model's embedding, checked against the ids.
        strict: Raise at the first row that cannot be used.
        seed: Seed of the order of the answers in a list; each row's order depends on the seed and
            the row number alone.
        limit: Read at most this many rows.
        append_eos: Append EOS to plain-text responses.
        list_labels: "scores" as given (ranks count from the worst, 0), or "order": 0 for the worst
            of the list, 1 for the next, equal scores equal. Data whose scores have several scales
            want "order".
        extras: Columns that losses read beside the texts.
        roles: Answers of a pair beside chosen and rejected, and their columns.
        labelled: Whether single answers must have a label. Otherwise labels are read where all
            rows have them.
        shuffle_lists: False keeps the stored order, for losses in which it has a meaning.
        score_prompt: Score the prompt's tokens too, all but the very first.

    Returns:
        (examples, layout, report).

    Raises:
        ValueError: The source cannot be opened, its columns fit no layout, no row can be used, a
            row cannot be used and `strict` is set, or the arguments contradict each other.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"layout must be auto or one of {', '.join(LAYOUTS)}, got {layout!r}.")
    if list_labels not in ("scores", "order"):
        raise ValueError(f"list_labels must be 'scores' or 'order', got {list_labels!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    encoder = Encoder(
        tokenizer,
        max_length=max_length,
        model_context=model_context,
        vocab_size=vocab_size,
        append_eos=append_eos,
        score_prompt=score_prompt,
    )
    raw = read_rows(source, split)
    layout, implicit_prompt, raw = _find_layout(raw, layout, limit, labelled)
    report, examples = SkipReport(), []
    for chunk in _chunks(raw, limit):
        parsed: list[tuple[RawRow, ParsedRow]] = []
        # Reported in the order of the rows, though tokenising a chunk comes after parsing it.
        bad: list[tuple[RawRow, BadRow]] = []
        for row in chunk:
            # A damaged file is one entry of the report, not a row that was seen.
            report.rows += row.kind != "damaged file"
            if row.data is None:
                bad.append((row, BadRow("", row.kind, row.detail)))
                continue
            try:
                good = parse_row(
                    row.data, layout, list_labels=list_labels, implicit_prompt=implicit_prompt,
                    labelled=labelled, roles=roles,
                )  # fmt: skip
                good.values = read_extras(row.data, extras, good.columns, layout == "lists")
                parsed.append((row, good))
            except BadRow as reason:
                bad.append((row, reason))
        encoded = encoder.encode([p for _, p in parsed])
        for (row, parsed_row), result in zip(parsed, encoded, strict=True):
            if isinstance(result, BadRow):
                bad.append((row, result))
                continue
            report.truncated += result.truncated
            shuffle = layout == "lists" and shuffle_lists
            examples.append(_example(row.row, parsed_row, result, shuffle, seed))
        for row, why in sorted(bad, key=lambda item: item[0].row):
            _report(report, row, why, strict)
    report.kept = len(examples)
    if not examples:
        raise ValueError(f"no row of {_name(source)} can be used as {layout}: {report}")
    if layout == "unpaired" and any(example.labels is None for example in examples):
        examples = [replace(example, labels=None) for example in examples]
    if extras:
        check_alike([(f"row {e.row}", e.values or {}) for e in examples], extras)
    return Loaded(examples, layout, report)


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


def _example(row: int, parsed: ParsedRow, encoded: Encoded, shuffle: bool, seed: int) -> Example:
    labels, sequences, values = parsed.labels, encoded.sequences, encoded.values
    if shuffle and labels is not None:
        order = np.random.default_rng([seed, row]).permutation(len(sequences))
        sequences = tuple(sequences[i] for i in order)
        labels = tuple(labels[i] for i in order)
        values = reorder(values, order.tolist())
    texts = repr((parsed.prompt, parsed.prompts, parsed.responses)).encode()
    text = int.from_bytes(hashlib.blake2b(texts, digest_size=8).digest(), "big")
    return Example(row, sequences, labels, parsed.weight, parsed.extra, values or None, text)


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

    Equal lengths count one half. In a list every two answers with different labels are a pair. An
    accuracy means something only where it differs from this number and from one minus it.

    Returns:
        The share, NaN where nothing is compared (unpaired data).
    """
    wins = pairs = 0.0
    for example in examples:
        labels = example.labels or (1.0, 0.0)
        lengths = [seq.length for seq in example.sequences]
        for i, better in enumerate(labels):
            for j, worse in enumerate(labels):
                if len(lengths) > 1 and better > worse:
                    pairs += 1
                    wins += (lengths[i] > lengths[j]) + 0.5 * (lengths[i] == lengths[j])
    return wins / pairs if pairs else float("nan")


def fingerprint(examples: list[Example], *, values: bool = False) -> str:
    """SHA-256 over everything that a log-probability can depend on, in order; with `values`, also
    over the extra columns that a loss reads."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((len(example.sequences), example.labels, example.weight)).encode())
        for seq in example.sequences:
            digest.update(np.array([len(seq.input_ids), seq.completion_start], np.int64).tobytes())
            digest.update(seq.input_ids.tobytes())
            if seq.token_weights is not None:
                digest.update(seq.token_weights.tobytes())
        if values and example.values:
            digest.update(repr(_plain(example.values)).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Without arrays, whose text leaves numbers out."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
