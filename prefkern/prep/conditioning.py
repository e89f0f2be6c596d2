"""Prompts that say what kind of answer is wanted: a score, a direction, a quality word."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Sequence

from . import cells
from .cells import BadRow
from .columns import list_of, number_of, pair_of, responses_of, text_of
from .prompts import SEPARATOR, conditioned, swapped
from .table import Row, Table, map_rows

SCORE_TEMPLATE = "Write an answer that deserves the overall score {score}."
CONTEXT_TEMPLATE = "Judge answers by this: {context}"
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

    def both(data: Row) -> Iterator[Row]:
        pair_of(data)
        high, low = number_of(data, chosen_score), number_of(data, rejected_score)
        if not high > low:
            raise BadRow(rejected_score, f"must be below {chosen_score} = {high:g}, got {low:g}")
        wanted = [template.format(score=f"{score:g}") for score in (high, low)]
        if wanted[0] == wanted[1]:
            raise BadRow(rejected_score, f"and {chosen_score} both print as {high:g}; round them")
        yield conditioned(data, wanted[0], separator)
        yield conditioned(swapped(data, (chosen_score, rejected_score)), wanted[1], separator)

    return map_rows(table, both)


def context_conditioned(
    table: Table,
    *,
    template: str = CONTEXT_TEMPLATE,
    context: str = "context",
    context_rejected: str = "context_rejected",
    separator: str = SEPARATOR,
) -> Table:
    """Writes the context of a comparison into the prompt, and where a second context turns it
    round, adds the pair swapped under that one.

    A model that does not read the context is right on half of such reversals, however good it is on
    each context alone.

    Source: context-aware preference modelling (arXiv 2407.14916), whose data hold two criteria per
    pair, each preferring another answer; abstract and data card read. Our wording is another.

    Columns in: `prompt`, `chosen`, `rejected`, `context` (text under which chosen is better) and,
    where there is one, `context_rejected` (text under which rejected is better).
    Columns out: the same; `prompt` begins with the context. One row per row and context; under the
    second, `chosen_<x>` and `rejected_<x>` are exchanged for every x.

    Args:
        table: Pairs with their context.
        template: Text of the condition with the field {context}.
        context, context_rejected: Columns, default these names.
        separator: Between condition and a plain-text prompt, default an empty line.

    Raises:
        ValueError: A template without {context}; names row and column: a missing context, two equal
            ones, equal answers, a column computed for the old prompt.
    """
    _check_template(template, "context")

    def each(data: Row) -> Iterator[Row]:
        pair_of(data)
        words = _plain(data, context)
        yield conditioned(data, template.format(context=words), separator)
        if data.get(context_rejected) is not None:
            other = _plain(data, context_rejected)
            if other == words:
                raise BadRow(context_rejected, f"is the same as {context}")
            turned = swapped(data, (context, context_rejected))
            yield conditioned(turned, template.format(context=other), separator)

    return map_rows(table, each)


def _plain(data: Row, column: str) -> str:
    words = text_of(data, column)
    if not isinstance(words, str):
        raise BadRow(column, "must be a string")
    return words


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
    vectors = _units(directions, objectives)

    def scored(data: Row) -> Iterator[Row]:
        texts, column = responses_of(data)
        rewards = [
            cells.floats(line, rewards_column, len(objectives))
            for line in list_of(data, rewards_column, len(texts))
        ]
        used = (column, rewards_column, "scores", "ranks")
        rest = {k: v for k, v in data.items() if k not in used}
        for vector in vectors:
            words = direction_words(vector, objectives, template)
            row = conditioned(rest, words, separator)
            scores = [
                math.fsum(a * b for a, b in zip(vector, line, strict=True)) for line in rewards
            ]
            yield row | {"completions": texts, "scores": scores, "direction": vector}

    return map_rows(table, scored)


def direction_prompts(
    table: Table,
    directions: Sequence[Sequence[float]],
    *,
    objectives: Sequence[str],
    template: str = DIRECTION_TEMPLATE,
    separator: str = SEPARATOR,
) -> Table:
    """Every prompt once under every direction, for answers that are still to be sampled.

    Source: the prompts of a DPA round (arXiv 2402.18571): the judge returns direction . rewards,
    pairs are best_vs_worst, the loss is sft, which reads the best answer alone. The condition reads
    as in `direction_conditioned`.

    Columns in: `prompt`.
    Columns out: `prompt` (conditioned), `direction` (list of m, for the judge); other columns are
    carried along. One row per prompt and direction, the directions of a prompt together.

    Args:
        table: Prompts.
        directions: Vectors of m numbers with length 1 within 0.01.
        objectives: m names, as the prompt shall call them.
        template: Text of the condition with the field {weights}.
        separator: Between condition and a plain-text prompt, default an empty line.

    Raises:
        ValueError: As `direction_conditioned`.
    """
    _check_template(template, "weights")
    vectors = _units(directions, objectives)
    words = [direction_words(vector, objectives, template) for vector in vectors]
    return map_rows(
        table,
        lambda data: [
            conditioned(data, text, separator) | {"direction": vector}
            for text, vector in zip(words, vectors, strict=True)
        ],
    )


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

    def prefixed_rows(data: Row) -> Iterator[Row]:
        if data.get("completion") is not None:
            label = cells.get(data, "label")
            if not isinstance(label, bool):
                raise BadRow("label", f"must be true or false, got {type(label).__name__}")
            text_of(data, "completion")
            row = conditioned(data, good_prefix if label else bad_prefix, separator)
            yield {k: v for k, v in row.items() if k != "label"}
            return
        pair_of(data)
        yield conditioned(data, good_prefix, separator)
        yield conditioned(swapped(data), bad_prefix, separator)

    return map_rows(table, prefixed_rows)


def direction_words(
    vector: Sequence[float], objectives: Sequence[str], template: str = DIRECTION_TEMPLATE
) -> str:
    """The condition for a unit vector in reward space: 100 times its entries, rounded."""
    values = _unit(0, vector, objectives)
    weights = " + ".join(
        f"{name}*{round(100 * v)}" for name, v in zip(objectives, values, strict=True)
    )
    return template.format(weights=weights)


def _units(directions: Sequence[Sequence[float]], objectives: Sequence[str]) -> list[list[float]]:
    if not directions:
        raise ValueError("directions must hold at least one vector, got none.")
    return [_unit(k, vector, objectives) for k, vector in enumerate(directions)]


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
