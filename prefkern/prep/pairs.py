"""Pairs from ranked lists: which two responses of a list are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .cells import BadRow, number
from .columns import TIES, RankedRow, list_of, one_of, ranked, responses_of, text_of
from .table import Row, Table, map_rows

PAIRS = ("all", "best_vs_rest", "adjacent", "best_vs_worst")


def pairs_from_lists(
    table: Table,
    *,
    pairs: str = "all",
    score_column: str | None = None,
    aligned: Sequence[str] = (),
    ties: str = "error",
) -> Table:
    """Makes one row per pair of responses with different scores.

    A pair is strict: the score of `chosen` is higher. Equal scores never form a pair.

    Source: `all` is the pair set of DPO on lists and of LiPO (arXiv 2402.01878); `best_vs_rest`
    that of curriculum DPO (arXiv 2403.07230); `best_vs_worst` with the likelihood loss `sft`, which
    reads `chosen` alone, is rejection-sampling fine-tuning.

    Columns in: `prompt` or `context`; `completions` or `responses`; `scores` or `ranks`.
    Columns out: `prompt`, `chosen`, `rejected`, `chosen_score`, `rejected_score`, and
    `chosen_<name>`, `rejected_<name>` for `aligned`; other columns are carried along. Within a
    list, pairs come in the order of the winner's rank, then of the loser's.

    Args:
        table: Ranked lists.
        pairs: "all"; "best_vs_rest" (the first best response against every other); "adjacent"
            (neighbours in the ranking; neighbours with equal scores give none); "best_vs_worst".
        score_column: Column of scores under another name, default None: `scores` or `ranks`.
        aligned: Further columns that hold one entry per response.
        ties: What to do with a list whose scores are all equal: "error" (default) or "skip".

    Raises:
        ValueError: Names row and column: fewer than two responses, a repeated response, a score
            that is missing or not finite, all scores equal.
    """
    one_of("pairs", pairs, PAIRS)
    one_of("ties", ties, TIES)

    def made(data: Row) -> list[Row]:
        found = ranked(data, score_column=score_column, aligned=aligned)
        if nothing_preferred(found, score_column, ties):
            return []
        return [pair_row(found, *two) for two in strict_pairs(found, pairs)]

    return map_rows(table, made)


def strict_pairs(found: RankedRow, pairs: str) -> list[tuple[int, int]]:
    """(winner, loser) indices of a list."""
    order = found.order()
    last = len(order) - 1
    places = {
        "all": [(a, b) for a in range(last) for b in range(a + 1, last + 1)],
        "best_vs_rest": [(0, b) for b in range(1, last + 1)],
        "adjacent": [(a, a + 1) for a in range(last)],
        "best_vs_worst": [(0, last)],
    }[pairs]
    two = [(order[a], order[b]) for a, b in places]
    return [(win, lose) for win, lose in two if found.scores[win] > found.scores[lose]]


def pair_row(found: RankedRow, winner: int, loser: int) -> Row:
    row = found.rest | {
        "chosen": found.texts[winner],
        "rejected": found.texts[loser],
        "chosen_score": found.scores[winner],
        "rejected_score": found.scores[loser],
    }
    for name, values in found.aligned.items():
        row |= {f"chosen_{name}": values[winner], f"rejected_{name}": values[loser]}
    return row


def pairs_from_judgements(
    table: Table, *, pairs: str = "all", probability_column: str = "pref_probs"
) -> Table:
    """Makes soft-labelled pairs from a matrix of pairwise preference probabilities.

    Responses are ranked by their mean probability of winning against the others (equal means in the
    order of storage), and `pref_prob` is the judged probability that `chosen` wins. It can be below
    one half where judgements contradict the ranking. The loss `soft_label` reads it.

    Source: soft preference strengths over K self-samples are the idea of OSP (arXiv 2405.14103).
    Which pairs its "ranked pairing" forms was not verified, so this is not called that method and
    the choice is left to the caller.

    Columns in: `prompt`, `completions` or `responses`, `pref_probs` [K][K]: entry [i][j] is the
    probability that response i beats response j; the diagonal is not read.
    Columns out: `prompt`, `chosen`, `rejected`, `pref_prob`; other columns are carried along.

    Args:
        table: Lists with judgements.
        pairs: "all", "best_vs_rest", "adjacent" or "best_vs_worst", of the ranking; default "all".
        probability_column: Column of the matrix, default "pref_probs".

    Raises:
        ValueError: Names row and column: fewer than two responses, a repeated one, a matrix that is
            not K x K, a probability outside [0, 1], [i][j] + [j][i] not 1 within 1e-6.
    """
    one_of("pairs", pairs, PAIRS)

    def judged(data: Row) -> Iterator[Row]:
        texts, column = responses_of(data)
        q = _probabilities(data, probability_column, len(texts))
        k = range(len(texts))
        wins = [sum(line) for line in q]  # K - 1 times the means; the diagonal is 0
        rest: Row = {"prompt": text_of(data, "prompt")}
        rest |= {n: v for n, v in data.items() if n not in ("prompt", column, probability_column)}
        # Places, not means, are the scores here: every two responses form a pair, equal means too.
        order = sorted(k, key=lambda a: -wins[a])
        places = [float(-order.index(a)) for a in k]
        for win, lose in strict_pairs(RankedRow(texts, places, rest, {}, column), pairs):
            row = {"chosen": texts[win], "rejected": texts[lose], "pref_prob": q[win][lose]}
            yield rest | row

    return map_rows(table, judged)


def drop_duplicates(
    table: Table,
    *,
    score_column: str | None = None,
    aligned: Sequence[str] = (),
    ties: str = "error",
) -> Table:
    """Keeps the first of equal responses in every list.

    Samples of a model repeat themselves; the functions that form pairs refuse such lists.

    Columns in: those of `pairs_from_lists`.
    Columns out: `prompt`, `completions`, `scores` (higher is better), the `aligned` columns; other
    columns are carried along.

    Args:
        table: Ranked lists.
        score_column: As in `pairs_from_lists`.
        aligned: As in `pairs_from_lists`.
        ties: What to do with a list of which one response is left: "error" (default) or "skip".

    Raises:
        ValueError: Names row and column: equal responses with different scores, or one response
            left.
    """
    one_of("ties", ties, TIES)

    def first_ones(data: Row) -> Iterator[Row]:
        found = ranked(data, score_column=score_column, aligned=aligned, least=1, distinct=False)
        texts, column, keep = found.texts, found.column, []
        for j, value in enumerate(texts):
            first = texts.index(value)
            if first == j:
                keep.append(j)
            elif found.scores[first] != found.scores[j]:
                raise BadRow(
                    f"{column}[{j}]",
                    f"is the same as {column}[{first}] with score {found.scores[j]} where that "
                    f"has {found.scores[first]}",
                )
        if len(keep) >= 2:
            yield select(found, keep)
        elif ties == "error":
            raise BadRow(column, f"one distinct response is left of {len(texts)}")

    return map_rows(table, first_ones)


def select(found: RankedRow, keep: Sequence[int]) -> Row:
    """The list row with the responses `keep`, in that order."""
    return (
        found.rest
        | {
            "completions": [found.texts[i] for i in keep],
            "scores": [found.scores[i] for i in keep],
        }
        | {name: [values[i] for i in keep] for name, values in found.aligned.items()}
    )


def nothing_preferred(found: RankedRow, score_column: str | None, ties: str) -> bool:
    if min(found.scores) < max(found.scores):
        return False
    if ties == "error":
        raise BadRow(
            score_column or "scores",
            f"all are {found.scores[0]}, so nothing is preferred; ties='skip' leaves such rows out",
        )
    return True


def _probabilities(data: Row, column: str, k: int) -> list[list[float]]:
    matrix = list_of(data, column, k)
    q = []
    for a, line in enumerate(matrix):
        if not isinstance(line, list | tuple) or len(line) != k:
            raise BadRow(f"{column}[{a}]", f"must hold {k} probabilities, one per response")
        q.append([0.0 if a == b else number(v, f"{column}[{a}][{b}]")
                  for b, v in enumerate(line)])  # fmt: skip
    for a in range(k):
        for b in range(k):
            if a != b and not 0.0 <= q[a][b] <= 1.0:
                raise BadRow(f"{column}[{a}][{b}]", f"must be in [0, 1], got {q[a][b]}")
            if a < b and abs(q[a][b] + q[b][a] - 1.0) > 1e-6:
                raise BadRow(
                    f"{column}[{a}][{b}]",
                    f"and [{b}][{a}] must sum to 1, got {q[a][b] + q[b][a]}",
                )
    return q
