"""Tables in and out: a `datasets.Dataset`, or any iterable of row mappings.

Every function of `prefkern.prep` takes either and gives back the same kind: a Dataset for a
Dataset, a list of dictionaries for everything else. Rows are counted from 0 in messages. Inputs are
never changed; texts and messages are shared between input and output rows, not copied.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .cells import BadRow

Row = dict[str, Any]
Table = Any  # datasets.Dataset or an iterable of mappings


def map_rows(table: Table, make: Callable[[Row], Iterable[Row]]) -> Table:
    """The table of the rows that `make` gives for each row in turn.

    Raises:
        ValueError: as `read_rows` and `like`; names row and column where `make` raises BadRow.
    """
    return like(table, made_rows(table, make))


def made_rows(table: Table, make: Callable[[Row], Iterable[Row]]) -> list[Row]:
    """As `map_rows`, always a list."""
    out: list[Row] = []
    for i, row in enumerate(read_rows(table)):
        try:
            out += make(row)
        except BadRow as why:
            raise ValueError(f"row {i}, column {why.column!r}: {why.detail}.") from None
    return out


def read_rows(table: Any) -> list[Row]:
    """The rows of a table as fresh dictionaries.

    Raises:
        ValueError: Not a table, a set of splits, an empty table, or a row that is no mapping.
    """
    if isinstance(table, Mapping):
        raise ValueError(
            f"a table of rows is needed, got a mapping with {sorted(map(str, table))}; pass one "
            "split of a DatasetDict, or a list of row dictionaries."
        )
    if isinstance(table, str) or not isinstance(table, Iterable):
        raise ValueError(
            "a table must be a datasets.Dataset or an iterable of row mappings, got "
            f"{type(table).__name__}."
        )
    rows = []
    for i, row in enumerate(_plain(table)):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {i}: must be a mapping, got {type(row).__name__}.")
        rows.append(dict(row))
    if not rows:
        raise ValueError("the table has no rows.")
    return rows


def like(table: Table, rows: list[Row]) -> Table:
    """`rows` as the kind of table that `table` is.

    Raises:
        ValueError: no row is left.
    """
    if not rows:
        raise ValueError("no row is left: every row of the table was skipped.")
    if not _is_dataset(table):
        return rows
    import datasets

    columns = {name: None for row in rows for name in row}  # in order of appearance
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})


def _plain(table: Any) -> Iterable[Any]:
    """Rows of plain Python values, whatever format a Dataset was given."""
    return table.with_format(None) if _is_dataset(table) else table


def _is_dataset(table: Table) -> bool:
    # A Dataset exists only where its module was imported, so nothing needs importing to tell.
    module = sys.modules.get("datasets")
    return module is not None and isinstance(table, module.Dataset)
