"""Programs ranked by the tests they pass, and tests by the programs that pass them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .cells import BadRow
from .columns import TIES, list_of, numbers_of, one_of, ranked, responses_of
from .pairs import select
from .table import Row, Table, map_rows


def mutual_scores(
    passed: Sequence[Sequence[float]], *, damping: float = 0.85, rounds: int = 10
) -> tuple[list[float], list[float]]:
    """Scores of programs and tests from who passes what.

    c <- (1 - d) c + d P t,  t <- (1 - d) t + d P' c,  both from the values before the round, all 1
    at the start. Scores are not normalised: only their order within one problem means something.

    Source: the self-validation score of CodeDPO (arXiv 2410.05605), after notes on the published
    version: ten rounds, d = 0.85, each from the scores before it. Its text was not read.

    Args:
        passed: `[K][T]` 1 where program k passes test t, else 0.
        damping: Weight d of the other side in [0, 1], default 0.85.
        rounds: Number of rounds >= 0, default 10.

    Returns:
        (scores of the K programs, scores of the T tests).

    Raises:
        ValueError: damping outside [0, 1], rounds < 0 or so many that scores overflow, not a matrix
            of 0 and 1, or empty.
    """
    if not 0.0 <= damping <= 1.0:
        raise ValueError(f"damping must be in [0, 1], got {damping}.")
    if rounds < 0:
        raise ValueError(f"rounds must be at least 0, got {rounds}.")
    if len({len(line) for line in passed}) != 1 or not len(passed[0]):
        raise ValueError("passed must be a [K][T] matrix, got lines of different or no length.")
    links = np.array(passed, dtype=np.float64)
    if not np.isin(links, (0.0, 1.0)).all():
        raise ValueError("passed must hold 0 or 1 (or booleans) only.")
    programs, tests = np.ones(links.shape[0]), np.ones(links.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        for _ in range(rounds):
            programs, tests = (
                (1.0 - damping) * programs + damping * (links @ tests),
                (1.0 - damping) * tests + damping * (programs @ links),
            )
    if not np.isfinite([*programs, *tests]).all():
        raise ValueError(f"scores overflow after {rounds} rounds; lower rounds.")
    return programs.tolist(), tests.tolist()


def rank_programs(
    table: Table, *, damping: float = 0.85, rounds: int = 10, passed_column: str = "passed"
) -> Table:
    """Adds the scores of `mutual_scores` to lists of programs; pairs then come from their order.

    Follow with `pairs_from_lists(pairs="best_vs_worst", ties="skip")` and, for CodeDPO's objective,
    the loss `rpo` (DPO with a likelihood term).

    Source: see `mutual_scores`; CodeDPO compares the program of the highest score with the lowest.

    Columns in: `prompt`, `completions` or `responses` (K programs), `passed` [K][T] (0/1 or bool).
    Columns out: `scores` [K] and `test_scores` [T], in place of `scores` or `ranks`; all other
    columns are carried along.

    Raises:
        ValueError: damping or rounds out of range; names row and column: fewer than two programs, a
            repeated one, a matrix that is not K x T of 0 and 1.
    """

    def scored(data: Row) -> Iterator[Row]:
        texts, _ = responses_of(data)
        matrix = _matrix(data, passed_column, len(texts))
        scores, test_scores = mutual_scores(matrix, damping=damping, rounds=rounds)
        rest = {k: v for k, v in data.items() if k != "ranks"}
        yield rest | {"scores": scores, "test_scores": test_scores}

    return map_rows(table, scored)


def rank_by_run_time(
    table: Table,
    *,
    passed_column: str = "passed",
    seconds_column: str = "seconds",
    ties: str = "error",
) -> Table:
    """Keeps the programs that pass every test, with minus the run time as score.

    Source: the efficiency pairs of CodeDPO (arXiv 2410.05605), after notes on its published text:
    the fast against the slow among programs that pass the tests of high scores. Which tests those
    are is the caller's: the row holds them alone.

    Columns in: `prompt`, `completions` or `responses`, `passed` [K][T], `seconds` [K] (>= 0).
    Columns out: `prompt`, `completions`, `scores` (of the programs kept); other columns but the two
    are carried along.

    Args:
        table: Lists of programs with test results.
        passed_column: Column of the results, default "passed".
        seconds_column: Column of the run times, default "seconds".
        ties: What to do with a list of which fewer than two programs are left: "error" (default) or
            "skip".

    Raises:
        ValueError: Names row and column, as `rank_programs`; a negative run time.
    """
    one_of("ties", ties, TIES)

    def working(data: Row) -> Iterator[Row]:
        texts, _ = responses_of(data)
        matrix = _matrix(data, passed_column, len(texts))
        seconds = numbers_of(data, seconds_column, len(texts))
        if min(seconds) < 0:
            raise BadRow(seconds_column, f"must be at least 0, got {min(seconds):g}")
        clean = {k: v for k, v in data.items() if k not in (passed_column, "scores", "ranks")}
        clean[seconds_column] = [-s for s in seconds]
        found = ranked(clean, score_column=seconds_column)
        keep = [k for k, line in enumerate(matrix) if all(line)]
        if len(keep) >= 2:
            yield select(found, keep)
        elif ties == "error":
            raise BadRow(passed_column, f"{len(keep)} programs pass every test; two are needed")

    return map_rows(table, working)


def _matrix(data: Row, column: str, count: int) -> list[list[float]]:
    lines = list_of(data, column, count)
    width = len(lines[0]) if isinstance(lines[0], list | tuple) else 0
    for k, line in enumerate(lines):
        if not isinstance(line, list | tuple) or len(line) != width or not width:
            raise BadRow(f"{column}[{k}]", "must hold one entry per test, the same number in all")
        if any(value not in (0, 1) for value in line):
            raise BadRow(f"{column}[{k}]", f"must hold 0, 1 or booleans only, got {list(line)}")
    return [[float(value) for value in line] for line in lines]
