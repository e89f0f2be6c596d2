"""Who labelled what: one pair per annotator, numbered annotators, and their reliability."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .cells import BadRow
from .columns import list_of, responses_of, text_of
from .table import Row, Table, like, made_rows, map_rows

UNKNOWN = "unknown"


class Numbered(NamedTuple):
    """What `number_annotators` returns."""

    table: Table
    names: list[str]  # names[annotator_id]


def pairs_per_annotator(table: Table, *, annotations_column: str = "annotations") -> Table:
    """Makes one pair per annotator who preferred one of two responses.

    Source: the data LCPO / RE-PO (arXiv 2509.24159) asks for: single labels with their annotator,
    not a majority vote.

    Columns in: `prompt`, `completions` or `responses` (two), `annotations`: list of {"annotator":
    str, "preferred": 0, 1 or null for a tie}.
    Columns out: `prompt`, `chosen`, `rejected`, `annotator`; other columns are carried along. Rows
    come in the order of the annotations; ties give none.

    Args:
        table: Two responses with several labels.
        annotations_column: Column of the labels, default "annotations".

    Raises:
        ValueError: Names row and column: not two different responses, an annotation without a name
            or with another value, two labels of one annotator; no label at all is left.
    """

    def pairs(data: Row) -> Iterator[Row]:
        texts, column = responses_of(data)
        if len(texts) != 2:
            raise BadRow(column, f"must hold two responses, got {len(texts)}")
        rest = {"prompt": text_of(data, "prompt")}
        rest |= {k: v for k, v in data.items() if k not in ("prompt", column, annotations_column)}
        seen: set[str] = set()
        for k, label in enumerate(list_of(data, annotations_column)):
            where = f"{annotations_column}[{k}]"
            name, preferred = _label(label, where)
            if name in seen:
                raise BadRow(where, f"annotator {name!r} has two labels for one pair")
            seen.add(name)
            if preferred is not None:
                chosen, rejected = texts[preferred], texts[1 - preferred]
                yield rest | {"chosen": chosen, "rejected": rejected, "annotator": name}

    return map_rows(table, pairs)


def number_annotators(table: Table, *, column: str = "annotator") -> Numbered:
    """Adds `annotator_id`, the place of the annotator's name in the sorted list of all names.

    Rows without a name belong to one virtual annotator "unknown", as LCPO / RE-PO (arXiv
    2509.24159) treats data without annotators.

    Columns in: `annotator` (str or null; the column may be absent).
    Columns out: `annotator_id` (int); all other columns are carried along.

    Returns:
        (table, names), names[annotator_id] being the name.

    Raises:
        ValueError: Names row and column: a name that is not a string or is blank.
    """
    named = made_rows(table, lambda row: [row | {"annotator_id": _name(row, column)}])
    names = sorted({row["annotator_id"] for row in named})
    ids = {name: k for k, name in enumerate(names)}
    out = [row | {"annotator_id": ids[row["annotator_id"]]} for row in named]
    return Numbered(like(table, out), names)


def with_reliability(
    table: Table,
    reliability: Mapping[str, float],
    *,
    default: float | None = 0.9,
    column: str = "annotator",
) -> Table:
    """Adds `eta`, the probability that the annotator of a pair labels correctly.

    The loss `lcpo` takes it as `eta` [P]; `prefkern.losses.pairwise.lcpo.update` gives the next
    value for an annotator from a batch of their pairs.

    Source: LCPO / RE-PO (arXiv 2509.24159), a detailed note with equations; 0.9 is its start value.

    Columns in: `annotator` (str; null or absent is "unknown").
    Columns out: `eta` (float in (0, 1)); all other columns are carried along.

    Args:
        table: Pairs.
        reliability: Annotator's name -> probability in (0, 1).
        default: For names that are not in `reliability`, default 0.9; None makes them an error.
        column: Column of the name, default "annotator".

    Raises:
        ValueError: A probability outside (0, 1); names row and column: a name without a value.
    """
    for name, start in {**reliability, "default": 0.9 if default is None else default}.items():
        if not 0.0 < start < 1.0:
            raise ValueError(f"the reliability of {name!r} must be in (0, 1), got {start}.")
    known: dict[str, float | None] = dict(reliability)

    def rated(data: Row) -> Iterator[Row]:
        name = _name(data, column)
        eta = known.get(name, default)
        if eta is None:
            raise BadRow(column, f"{name!r} has no reliability; known: {sorted(reliability)}")
        yield data | {"eta": float(eta)}

    return map_rows(table, rated)


def _name(data: Mapping[str, Any], column: str) -> str:
    value = data.get(column)
    return UNKNOWN if value is None else _checked(value, column)


def _checked(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise BadRow(where, f"must be a name (str), got {name!r}")
    return name


def _label(label: Any, where: str) -> tuple[str, int | None]:
    if not isinstance(label, Mapping) or not {"annotator", "preferred"} <= set(label):
        raise BadRow(where, "must hold annotator and preferred")
    preferred = label["preferred"]
    if isinstance(preferred, bool) or preferred not in (0, 1, None):
        raise BadRow(where, f"preferred must be 0, 1 or null, got {preferred!r}")
    return _checked(label["annotator"], f"{where}.annotator"), preferred
