"""The rows that are read: all of them, with what of a row is a prompt and what its answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ...prep.cells import BadRow, Text, filled, get, list_column, list_prompt, list_texts, text
from ..data.read import RawRow, check_source, raw_rows
from ..data.records import SkipReport
from ..data.rows import layout_of, parse_row
from ..data.unread import TEXTS, Beside

PARQUET = ".parquet"


class Answers(NamedTuple):
    """The answers of one row, each with its prompt."""

    prompts: list[Text]
    texts: list[Text]


@dataclass(frozen=True)
class Source:
    """A data set in memory."""

    name: str
    rows: list[RawRow]  # all readable

    @property
    def is_parquet(self) -> bool:
        return Path(self.name).suffix == PARQUET and Path(self.name).is_file()

    def digest(self) -> str:
        """Hash of all rows in order."""
        found = hashlib.sha256()
        for row in self.rows:
            found.update(json.dumps(row.data, sort_keys=True, default=repr).encode())
        return found.hexdigest()[:16]


def read_source(name: str, split: str, limit: int | None) -> Source:
    """Every row of a data set.

    Raises:
        ValueError: there is none, or a line cannot be read: a copy of the data would lack it.
    """
    check_source(name)
    rows = []
    for row in raw_rows(name, split):
        if row.data is None:
            raise ValueError(
                f"{row.where}: {row.detail}; the new file could not hold this row: mend or remove "
                "it first."
            )
        rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        raise ValueError(f"{name} has no row.")
    return Source(name, rows)


def named_columns(pairs: Sequence[str]) -> dict[str, str]:
    """('prompt=question',) -> {'prompt': 'question'}."""
    found = {}
    for pair in pairs:
        name, sign, column = pair.partition("=")
        if not (sign and column) or name not in TEXTS:
            raise ValueError(
                f"column must be written name=column with a name of {', '.join(TEXTS)}, got "
                f"{pair!r}."
            )
        found[name] = column
    return found


def under_read_names(data: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """A row with its texts under the names that are read."""
    rest = {k: v for k, v in data.items() if k not in renamed.values()}
    return {**rest, **{name: data.get(column) for name, column in renamed.items()}}


def read_answers(
    source: Source, renamed: Mapping[str, str]
) -> tuple[str, list[Answers | None], SkipReport]:
    """Layout, answers of every row (None where the row cannot be used), and the reasons.

    Raises:
        ValueError: no row can be used; a question in a column that is not read; pictures.
    """
    rows = [replace(row, data=under_read_names(row.data or {}, renamed)) for row in source.rows]
    found = (layout_of(row.data or {}, labelled=False) for row in rows)
    layout = next((form for form in found if form is not None), None)
    if layout is None:
        columns = ", ".join(map(repr, source.rows[0].data or {})) or "none"
        raise ValueError(
            f"no row of {source.name} holds answers: pairs are chosen and rejected, lists "
            f"completions or responses, single answers completion; the columns found: {columns}. "
            "--column chosen=NAME reads a text from another column."
        )
    implicit = layout == "pairs" and all((row.data or {}).get("prompt") is None for row in rows)
    beside = Beside(layout, (), {}, renamed)
    report, answers = SkipReport(), list[Answers | None]()
    for row in rows:
        data = row.data or {}
        report.rows += 1
        beside.add(row.where, data, implicit=implicit)
        try:
            answers.append(_answers(data, layout, implicit))
        except BadRow as why:
            report.add(
                f"column '{why.column}': {why.kind}",
                f"{row.where} column '{why.column}': {why.detail}",
            )
            answers.append(None)
    report.kept = report.rows - report.total
    if not report.kept:
        raise ValueError(f"no row of {source.name} can be used as {layout}: {report}")
    return layout, answers, report


def _answers(data: Mapping[str, Any], layout: str, implicit: bool) -> Answers:
    if layout == "lists":
        column = list_prompt(data)
        prompt = filled(text(get(data, column), column), column)
        texts = list_texts(data, least=1)
        for i, answer in enumerate(texts):
            filled(answer, f"{list_column(data)}[{i}]")
        if isinstance(prompt, str) and not all(isinstance(answer, str) for answer in texts):
            prompt = [{"role": "user", "content": prompt}]
        return Answers([prompt] * len(texts), texts)
    row = parse_row(data, layout, implicit_prompt=implicit, labelled=False)
    return Answers(row.prompts or [row.prompt] * len(row.responses), row.responses)
