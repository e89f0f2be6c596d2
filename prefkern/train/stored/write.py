"""The new file: the rows as they were read, with further columns, in the format of the input."""

from __future__ import annotations

import gzip
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import prep
from ..read_config import nearest
from .source import Source, under_read_names

Rows = list[dict[str, Any]]
PrepStep = Callable[[Rows], Rows]


def prep_steps(names: Sequence[str]) -> list[PrepStep]:
    """The functions of prefkern.prep that `NAME:argument=value,...` mean, with their arguments.

    Raises:
        ValueError: an unknown function or argument.
    """
    return [_prep_step(name) for name in names]


def _prep_step(given: str) -> PrepStep:
    import yaml

    name, _, text = given.partition(":")
    if name not in prep.__all__:
        raise ValueError(f"prep: prefkern.prep has no {name!r}{nearest(name, prep.__all__)}.")
    function = getattr(prep, name)
    parameters = inspect.signature(function).parameters
    known = [k for k in parameters if k != "table"]
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, sign, value = part.partition("=")
        if not sign or key not in known:
            near = nearest(key, known) or f"; it has {', '.join(known) or 'none'}"
            raise ValueError(
                f"prep: write {name}:argument=value,argument=value, got {part!r}{near}."
            )
        if parameters[key].annotation in (str, "str", "str | None"):
            options[key] = value
            continue
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"prep: {part!r} of {name} has no value that can be read.") from None

    def step(rows: Rows) -> Rows:
        try:
            return function(rows, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"prep {given}: {' '.join(str(error).split())} What was computed is kept: the same "
                "command with another --prep, or without, continues."
            ) from error

    return step


def writer(
    source: Source,
    added: Sequence[Mapping[str, Any] | None],  # one per row; None leaves the row out
    *,
    without: Sequence[str] = (),
    steps: Sequence[PrepStep] = (),
    renamed: Mapping[str, str] | None = None,
) -> Callable[[Path], None]:
    """What writes the rows with their added columns, and without some of their own. The steps see
    texts under the names that are read."""
    rows: Rows = [
        {k: v for k, v in (row.data or {}).items() if k not in without} | dict(more)
        for row, more in zip(source.rows, added, strict=True)
        if more is not None
    ]
    if steps and renamed:
        rows = [under_read_names(row, renamed) for row in rows]
    for step in steps:
        rows = step(rows)

    def write(path: Path) -> None:
        if not source.is_parquet:
            _write_json_lines(path, rows)
        elif steps:
            _write_table(path, rows)
        else:
            _write_parquet(path, source, added, without)

    return write


def _write_json_lines(path: Path, rows: Rows) -> None:
    compressed = ".gz." in path.name  # the name of the file that is made stands inside
    with path.open("wb") as raw:
        file: Any = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if compressed else raw
        for number, row in enumerate(rows):
            try:
                line = json.dumps(row)
            except TypeError as error:
                raise ValueError(
                    f"row {number} holds what JSON cannot ({error}); drop that column from the "
                    "data set first."
                ) from None
            file.write(line.encode() + b"\n")
        if compressed:
            file.close()


def _write_table(path: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    names = {name: None for row in rows for name in row}
    try:
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"the rows do not fit one Parquet table: {error}") from error
    pyarrow.parquet.write_table(table, path)


def _write_parquet(
    path: Path,
    source: Source,
    added: Sequence[Mapping[str, Any] | None],
    without: Sequence[str],
) -> None:
    """The columns of the source as they are stored, types included, and the added ones."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(source.name).slice(0, len(source.rows))
    kept = [i for i, more in enumerate(added) if more is not None]
    table = table.drop_columns([name for name in without if name in table.column_names]).take(kept)
    there = [more for more in added if more is not None]
    for name in dict.fromkeys(name for more in there for name in more):
        values = pyarrow.array([more.get(name) for more in there])
        table = table.append_column(name, values)
    pyarrow.parquet.write_table(table, path)
