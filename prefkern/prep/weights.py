"""Weight columns: one number per pair, or one per token of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .cells import BadRow, get, number
from .table import Row, Table, like, made_rows, map_rows, read_rows


def pair_weights(
    table: Table,
    weight: Sequence[float] | Callable[[Row], float],
    *,
    mean_one: bool = False,
) -> Table:
    """Adds the column `weight`, one number per row.

    Columns in: whatever `weight` reads.
    Columns out: `weight` (float >= 0); all other columns are carried along.

    Args:
        table: Pairs, lists or single answers.
        weight: One number per row, or a function of a row.
        mean_one: Divide by the mean over the table, so that the size of the loss stays, default
            False.

    Raises:
        ValueError: Another number of weights than rows; names row and column: `weight` is there
            already, or a weight is negative or not finite; all are 0 with mean_one.
    """
    rows = read_rows(table)
    values = [weight(dict(row)) for row in rows] if callable(weight) else list(weight)
    if len(values) != len(rows):
        raise ValueError(f"weight must hold one number per row, {len(rows)}, got {len(values)}.")
    given = iter(values)

    def weighed(row: Row) -> Iterator[Row]:
        if row.get("weight") is not None:
            raise BadRow("weight", "is there already; drop the column first")
        yield row | {"weight": _weight(next(given), "weight")}

    out = made_rows(rows, weighed)
    if mean_one:
        total = sum(row["weight"] for row in out)
        if total == 0.0:
            raise ValueError("mean_one divides by the mean weight, and all weights are 0.")
        out = [row | {"weight": row["weight"] * len(out) / total} for row in out]
    return like(table, out)


def token_weights(
    table: Table,
    weigh: Callable[[list[Any]], Sequence[float]],
    *,
    columns: Sequence[str] = ("chosen", "rejected"),
    tokens_suffix: str = "_ids",
) -> Table:
    """Adds `chosen_weights` and `rejected_weights`, one number per token of each answer.

    Columns in: `chosen_ids`, `rejected_ids`: the tokens of each answer without its prompt, as ids
    or as strings.
    Columns out: `chosen_weights`, `rejected_weights` (lists of float >= 0); all other columns are
    carried along.

    Args:
        table: Rows with tokenised answers.
        weigh: Function from the tokens of one answer to as many numbers.
        columns: Answers to weigh, default ("chosen", "rejected"); ("completion",) for single ones.
        tokens_suffix: The tokens of answer c stand in c + tokens_suffix, default "_ids".

    Raises:
        ValueError: Names row and column: tokens missing, weights there already, another number of
            weights than tokens, a weight that is negative or not finite.
    """

    def weighed(row: Row) -> Iterator[Row]:
        new: Row = {}
        for name in columns:
            target = f"{name}_weights"
            if row.get(target) is not None:
                raise BadRow(target, "is there already; drop the column first")
            tokens = get(row, f"{name}{tokens_suffix}")
            values = list(weigh(list(tokens)))
            if len(values) != len(tokens):
                raise BadRow(
                    target, f"must hold {len(tokens)} numbers, one per token, got {len(values)}"
                )
            new[target] = [_weight(v, f"{target}[{k}]") for k, v in enumerate(values)]
        yield row | new

    return map_rows(table, weighed)


def _weight(value: Any, column: str) -> float:
    found = number(value, column)
    if found < 0.0:
        raise BadRow(column, f"must be at least 0, got {found:g}")
    return found
