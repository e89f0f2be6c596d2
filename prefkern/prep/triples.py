"""Triples from ranked lists: a gold answer beside a pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .cells import BadRow
from .columns import TIES, one_of, ranked
from .pairs import pair_row
from .table import Row, Table, map_rows


def triples_from_lists(
    table: Table,
    *,
    gold_column: str = "gold",
    score_column: str | None = None,
    aligned: Sequence[str] = (),
    ties: str = "error",
) -> Table:
    """Takes the best response as gold, the second as chosen and the last as rejected.

    The losses `tpo` and `tpo_l` learn gold by likelihood and compare the other two.

    Source: Triple Preference Optimization (arXiv 2405.16681), data rule of the authors' code.

    Columns in: those of `pairs_from_lists`.
    Columns out: `prompt`, `gold`, `chosen`, `rejected`, `gold_score`, `chosen_score`,
    `rejected_score`; other columns are carried along.

    Args:
        table: Ranked lists of three responses or more.
        gold_column: Name of the gold column, default "gold"; TRL's trainer reads "reference".
        score_column: As in `pairs_from_lists`.
        aligned: As in `pairs_from_lists`.
        ties: What to do where first and second, or second and last, have equal scores, so that the
            roles are not determined: "error" (default) or "skip".

    Raises:
        ValueError: As `pairs_from_lists`; fewer than three responses.
    """
    one_of("ties", ties, TIES)

    def triple(data: Row) -> Iterator[Row]:
        found = ranked(data, score_column=score_column, aligned=aligned, least=3)
        order = found.order()
        gold, chosen, rejected = order[0], order[1], order[-1]
        first, second, last = (found.scores[j] for j in (gold, chosen, rejected))
        if first == second or second == last:
            if ties == "skip":
                return
            raise BadRow(
                score_column or "scores",
                f"first, second and last must differ, got {first}, {second}, {last}; ties='skip' "
                "leaves such rows out",
            )
        row = {gold_column: found.texts[gold], "gold_score": first}
        row |= {f"gold_{name}": values[gold] for name, values in found.aligned.items()}
        yield pair_row(found, chosen, rejected) | row

    return map_rows(table, triple)
