"""Statistical rejection sampling from scored candidates, and pairs by rounds of a tournament."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .cells import BadRow
from .columns import TIES, one_of, ranked
from .pairs import pair_row, select
from .table import Row, Table, map_rows


def rejection_sample(
    table: Table,
    *,
    num_samples: int = 8,
    beta: float = 0.5,
    seed: int = 0,
    score_column: str | None = None,
    aligned: Sequence[str] = (),
) -> Table:
    """Draws `num_samples` candidates of every list as the policy exp(score / beta) would have.

    Passes over the candidates that are left are repeated until enough are accepted; in a pass each
    is accepted with probability exp((R - R_max) / beta), where R_max is the best score among those
    left when the pass began. A best candidate is always accepted, so every pass takes one. beta ->
    0 takes the best in order, beta = inf the first ones.

    Source: RSO (arXiv 2309.06657 algorithm 1), algorithm text read; the paper's 8 out of 64 samples
    as default counts from memory. The losses of the paper are `hinge` and `ln_dpo`.

    Columns in: those of `pairs_from_lists`; the candidates are samples of the policy to improve.
    Columns out: `prompt`, `completions`, `scores` in the order of acceptance, the `aligned`
    columns; other columns are carried along.

    Args:
        table: Scored candidates.
        num_samples: Accepted per list, >= 1, default 8.
        beta: Temperature in units of the score, > 0, default 0.5; inf is allowed.
        seed: Seed, default 0. The draw of a row depends on seed and row number alone.
        score_column: As in `pairs_from_lists`.
        aligned: As in `pairs_from_lists`.

    Raises:
        ValueError: num_samples < 1, beta <= 0 or NaN; names row and column: fewer candidates than
            num_samples, a repeated candidate, a score that is missing or not finite.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    if not beta > 0.0:
        raise ValueError(f"beta must be > 0, got {beta}.")
    numbers = itertools.count()

    def drawn(data: Row) -> Iterator[Row]:
        uniform = np.random.default_rng([seed, next(numbers)]).random
        found = ranked(data, score_column=score_column, aligned=aligned, least=1)
        if len(found.texts) < num_samples:
            raise BadRow(
                found.column,
                f"holds {len(found.texts)} candidates where num_samples={num_samples} are drawn",
            )
        yield select(found, accept(found.scores, num_samples, beta, uniform))

    return map_rows(table, drawn)


def accept(
    scores: Sequence[float], count: int, beta: float, uniform: Callable[[], float]
) -> list[int]:
    """Indices of the accepted candidates in order; `uniform` gives numbers in [0, 1)."""
    left, taken = list(range(len(scores))), list[int]()
    while len(taken) < count:
        best = max(scores[i] for i in left)
        for i in list(left):
            if uniform() < math.exp((scores[i] - best) / beta):
                taken.append(i)
                left.remove(i)
                if len(taken) == count:
                    break
    return taken


def tournament_pairs(
    table: Table,
    *,
    rounds: str = "first",
    score_column: str | None = None,
    aligned: Sequence[str] = (),
    ties: str = "error",
) -> Table:
    """Pairs neighbours of every list; the higher score is `chosen`, and winners may play on.

    Responses 0 and 1 meet, 2 and 3 meet, ...; a last one without partner goes on unpaired. With
    rounds="all" the winners meet in the next round until one is left: n - 1 pairs for n responses,
    n // 2 with rounds="first". Equal scores give no pair and the earlier response goes on.

    Source: RSO (arXiv 2309.06657), whose pairs are labelled by a pairwise ranking model; here
    scores decide, which is the same wherever that model orders as the scores do.

    Columns in and out: those of `pairs_from_lists`, with `round` (int, from 0).

    Args:
        table: Lists, for example from `rejection_sample`.
        rounds: "first" (default) or "all".
        score_column: As in `pairs_from_lists`.
        aligned: As in `pairs_from_lists`.
        ties: What to do with a list that gives no pair: "error" (default) or "skip".

    Raises:
        ValueError: As `pairs_from_lists`; a list in which every meeting is a tie.
    """
    one_of("rounds", rounds, ("first", "all"))
    one_of("ties", ties, TIES)

    def paired(data: Row) -> list[Row]:
        found = ranked(data, score_column=score_column, aligned=aligned)
        playing, rows, played = list(range(len(found.texts))), [], 0
        while len(playing) > 1 and (played == 0 or rounds == "all"):
            winners = []
            for a, b in zip(playing[::2], playing[1::2], strict=False):
                winner, loser = (b, a) if found.scores[b] > found.scores[a] else (a, b)
                winners.append(winner)
                if found.scores[winner] > found.scores[loser]:
                    rows.append(pair_row(found, winner, loser) | {"round": played})
            playing = winners + playing[len(playing) - len(playing) % 2 :]
            played += 1
        if not rows and ties == "error":
            raise BadRow(score_column or "scores", "every meeting is a tie, so there is no pair")
        return rows

    return map_rows(table, paired)
