"""Prompts that say what kind of answer is wanted: a score, a direction, a quality word."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

from .columns import floats, get, items, list_texts, number, pair, text
from .prompts import SEPARATOR, conditioned, swapped
from .table import Row, Table, bad, like, read_rows

SCORE_TEMPLATE = "Write an answer that deserves the overall score {score}."
DIRECTION_TEMPLATE = "Write the answer that has the highest weighted rating {weights}."


def score_conditioned(
    table: Table,
    *,
    template: str = SCORE_TEMPLATE,
    chosen_score: str = "chosen_score",
    rejected_score: str = "rejected_score",
    separator: str = SEPARATOR,
) -> Table:
    """Makes two pairs of each: under the score of chosen as it is, under that of rejected swapped.

    An answer is good or bad for a target score: where the prompt asks for the lower score, the
    answer that has it is the preferred one.

    Source: reward-augmented data (arXiv 2410.08067), authors' script read. The paper's variant
    without system prompt does not swap the answers in that script and is not followed.

    Columns in: `prompt`, `chosen`, `rejected`, `chosen_score`, `rejected_score`.
    Columns out: the same; `prompt` begins with the target. Two rows per row, one after the other;
    in the second, `chosen_<x>` and `rejected_<x>` are exchanged for every x.

    Args:
        table: Pairs with the scores of both answers.
        template: Text of the condition with the field {score}, printed to six digits.
        chosen_score: Column of the score of chosen, default "chosen_score".
        rejected_score: Column of the score of rejected, default "rejected_score".
        separator: Between condition and a plain-text prompt, default an empty line.

    Raises:
        ValueError: A template without {score}; names row and column: a score missing or not finite,
            rejected's not below chosen's, equal answers, a column computed for the old prompt.
    """
    _check_template(template, "score")
    out = []
    for i, data in enumerate(read_rows(table)):
        pair(data, i)
        high = number(get(data, i, chosen_score), i, chosen_score)
        low = number(get(data, i, rejected_score), i, rejected_score)
        if not high > low:
            raise bad(i, rejected_score, f"must be below {chosen_score} = {high:g}, got {low:g}")
        wanted = [template.format(score=f"{score:g}") for score in (high, low)]
        if wanted[0] == wanted[1]:
            raise bad(i, rejected_score, f"and {chosen_score} both print as {high:g}; round them")
        out.append(conditioned(data, i, wanted[0], separator))
        other = swapped(data, i, (chosen_score, rejected_score))
        out.append(conditioned(other, i, wanted[1], separator))
    return like(table, out)


def direction_conditioned(
    table: Table,
    directions: Sequence[Sequence[float]],
    *,
    objectives: Sequence[str],
    template: str = DIRECTION_TEMPLATE,
    rewards_column: str = "rewards",
    separator: str = SEPARATOR,
) -> Table:
    """Scores every list along unit vectors in reward space and writes the vector into the prompt.

    score = v . rewards. The prompt states 100 v rounded to whole numbers. Then
    `pairs_from_lists(pairs="best_vs_worst")` and the loss `sft`, which reads `chosen` alone, are
    rejection-sampling fine-tuning under the direction; pair and list losses work as well.

    Source: DPA (arXiv 2402.18571), the authors' model card read (integer weights in the prompt);
    their training code was not. Our wording of the prompt is another.

    Columns in: `prompt`, `completions` or `responses`, `rewards` [K][m]: one number per objective.
    Columns out: `prompt` (conditioned), `completions`, `scores`, `direction` (list of m); other
    columns are carried along. One row per list and direction, the directions of a list together.

    Args:
        table: Lists with several rewards per response.
        directions: Vectors of m numbers with length 1 within 0.01.
        objectives: m names, as the prompt shall call them.
        template: Text of the condition with the field {weights}.
        rewards_column: Column of the rewards, default "rewards".
        separator: Between condition and a plain-text prompt, default an empty line.

    Raises:
        ValueError: No direction, one that is not of unit length or not of m numbers, a template
            without {weights}; names row and column as `pairs_from_lists` does.
    """
    _check_template(template, "weights")
    vectors = [_unit(k, vector, objectives) for k, vector in enumerate(directions)]
    if not vectors:
        raise ValueError("directions must hold at least one vector, got none.")
    out = []
    for i, data in enumerate(read_rows(table)):
        texts, column = list_texts(data, i)
        rewards = [
            floats({rewards_column: line}, i, rewards_column, len(objectives))
            for line in items(data, i, rewards_column, len(texts))
        ]
        used = (column, rewards_column, "scores", "ranks")
        rest = {k: v for k, v in data.items() if k not in used}
        for vector in vectors:
            words = direction_words(vector, objectives, template)
            row = conditioned(rest, i, words, separator)
            scores = [
                math.fsum(a * b for a, b in zip(vector, line, strict=True)) for line in rewards
            ]
            out.append(row | {"completions": texts, "scores": scores, "direction": vector})
    return like(table, out)


def control_prefix(
    table: Table, *, good_prefix: str, bad_prefix: str, separator: str = SEPARATOR
) -> Table:
    """Writes the quality of an answer before its prompt, so that all answers can be learned.

    Pairs become two rows: `good_prefix` with the pair as it is, `bad_prefix` with the pair swapped;
    the loss `sft`, which reads `chosen` alone, learns each answer under its own prefix. Single
    answers keep their number; the label chooses the prefix and is then gone, since all are to be
    imitated.

    Source: control tokens, as MEET (arXiv 2310.00819, abstract read) conditions on them. MEET first
    tunes the control tokens alone as soft prompts or adapters; this is the data side only, with
    prefixes in words.

    Columns in: `prompt`, `chosen`, `rejected`; or `prompt`, `completion`, `label` (bool).
    Columns out: `prompt`, `chosen`, `rejected` in two rows per row; or `prompt`, `completion`.
    Other columns are carried along.

    Args:
        table: Pairs, or single answers.
        good_prefix: Prefix of preferred answers.
        bad_prefix: Prefix of the others; must differ.
        separator: Between prefix and a plain-text prompt, default an empty line.

    Raises:
        ValueError: Blank or equal prefixes; names row and column: a missing column, a label that is
            not a bool, equal answers, a column computed for the old prompt.
    """
    if not good_prefix.strip() or not bad_prefix.strip() or good_prefix == bad_prefix:
        raise ValueError(
            "good_prefix and bad_prefix must be two different texts, got "
            f"{good_prefix!r} and {bad_prefix!r}."
        )
    out: list[Row] = []
    for i, data in enumerate(read_rows(table)):
        if data.get("completion") is not None:
            label = get(data, i, "label")
            if not isinstance(label, bool):
                raise bad(i, "label", f"must be true or false, got {type(label).__name__}")
            text(data["completion"], i, "completion")
            row = conditioned(data, i, good_prefix if label else bad_prefix, separator)
            out.append({k: v for k, v in row.items() if k != "label"})
            continue
        pair(data, i)
        out.append(conditioned(data, i, good_prefix, separator))
        out.append(conditioned(swapped(data, i), i, bad_prefix, separator))
    return like(table, out)


def direction_words(
    vector: Sequence[float], objectives: Sequence[str], template: str = DIRECTION_TEMPLATE
) -> str:
    """The condition for a unit vector in reward space: 100 times its entries, rounded."""
    values = _unit(0, vector, objectives)
    weights = " + ".join(
        f"{name}*{round(100 * v)}" for name, v in zip(objectives, values, strict=True)
    )
    return template.format(weights=weights)


def _unit(index: int, vector: Sequence[float], objectives: Sequence[str]) -> list[float]:
    values = [float(v) for v in vector]
    if len(values) != len(objectives):
        raise ValueError(
            f"directions[{index}] must hold {len(objectives)} numbers, one per objective, got "
            f"{len(values)}."
        )
    length = math.hypot(*values)
    if not abs(length - 1.0) <= 0.01:
        raise ValueError(
            f"directions[{index}] must have length 1 within 0.01, got {length:g}; divide by it."
        )
    return values


def _check_template(template: str, field: str) -> None:
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    if fields != {field}:
        raise ValueError(
            f"template must hold the field {{{field}}} and no other, got {template!r}; write "
            "literal braces twice."
        )
