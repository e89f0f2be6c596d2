"""Easy pairs first: the best response of a list against every other, in stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .cells import BadRow
from .columns import TIES, number_of, numbers_of, one_of, ranked
from .pairs import nothing_preferred, pair_row, strict_pairs
from .table import Row, Table, like, made_rows


def curriculum(
    table: Table,
    *,
    gap_column: str | None = None,
    score_column: str | None = None,
    aligned: Sequence[str] = (),
    ties: str = "error",
) -> Table:
    """Makes the pairs (best, other) of every list and sorts them from easy to hard, in stages.

    The gap of a pair is |g(best) - g(other)|; the pair with the largest gap of a list is in stage
    0, the next in stage 1, and so on (equal gaps: the lower-ranked response first). The rows come
    stage by stage, within a stage in the order of the table. Lists of different lengths start
    together and end in different stages. Train one stage after the other with a pair loss, and take
    the model of the previous stage as reference; `split_stages` gives the stages.

    Source: Curry-DPO (arXiv 2403.07230), from second-hand descriptions that agree with each other;
    its training schedule beyond the order of the pairs was not verified.

    Columns in: those of `pairs_from_lists`.
    Columns out: those of `pairs_from_lists` with `stage` (int) and `gap` (float).

    Args:
        table: Ranked lists.
        gap_column: Column with one number per response that measures the gap, such as `logps`;
            default None: the scores. Which response is better is always read from the scores.
        score_column: As in `pairs_from_lists`.
        aligned: As in `pairs_from_lists`.
        ties: What to do with a list whose scores are all equal: "error" (default) or "skip".

    Raises:
        ValueError: As `pairs_from_lists`; a gap column of another length or not finite.
    """
    one_of("ties", ties, TIES)

    def staged(data: Row) -> Iterator[Row]:
        found = ranked(data, score_column=score_column, aligned=aligned)
        if nothing_preferred(found, score_column, ties):
            return
        gaps = found.scores
        if gap_column is not None:
            gaps = numbers_of(data, gap_column, len(found.texts))
        pairs = strict_pairs(found, "best_vs_rest")[::-1]  # the lower-ranked response first
        by_gap = [(abs(gaps[best] - gaps[other]), best, other) for best, other in pairs]
        by_gap.sort(key=lambda entry: -entry[0])  # stable
        for stage, (gap, best, other) in enumerate(by_gap):
            yield pair_row(found, best, other) | {"stage": stage, "gap": gap}

    return like(table, sorted(made_rows(table, staged), key=lambda row: row["stage"]))


def split_stages(table: Table) -> list[Table]:
    """Splits a table at its column `stage`: one table per stage, in increasing order.

    Columns in and out: `stage` (whole number) and whatever else there is.

    Raises:
        ValueError: Names the row whose `stage` is missing or not a whole number.
    """
    stages: dict[int, list[Row]] = {}

    def staged(row: Row) -> Iterator[Row]:
        stage = number_of(row, "stage")
        if stage != int(stage):
            raise BadRow("stage", f"must be a whole number, got {stage}")
        stages.setdefault(int(stage), []).append(row)
        yield row

    made_rows(table, staged)
    return [like(table, stages[stage]) for stage in sorted(stages)]
