"""BiAlign's rows: one answer after all demonstrations and after random subsets of them, scored by
the teacher."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from ...integrations import hf
from ..config import TrainConfig
from .answer_logps import answer_logps


def teacher_lists(
    rows: Sequence[Mapping[str, Any]],
    teacher: hf.Model,
    tokenizer: Any,
    config: TrainConfig,
    *,
    subsets: int = 4,
    shots: int | None = None,
    separator: str = "\n\n",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Lists that `bialign` trains on with the teacher as --ref-model and --likelihood-prompt.

    Each row becomes one list: the first entry is the answer after all its demonstrations and is not
    ranked, the others are the same answer after random subsets, ranked by the teacher's
    log-probability of it. Rows that the teacher cannot read are left out.

    Args:
        rows: With `demonstrations` (a list of texts, or of {"prompt", "completion"}), `prompt` and
            `completion`, all plain text.
        teacher, tokenizer: A causal model and the tokens of the run.
        config: max_length, append_eos and precision are read.
        subsets: N, at least 2.
        shots: Demonstrations of a subset; None draws a number for each subset of a row.
        separator: Between demonstrations, and before the query.
        seed: Of the draws.

    Returns:
        Rows with `prompts`, `completions` and `scores`, null for the first.

    Raises:
        ValueError: fewer than two subsets, rows without demonstrations enough for different
            subsets, columns that are missing or no texts.
    """
    if subsets < 2:
        raise ValueError(f"subsets must be at least 2, which can be ranked, got {subsets}.")
    generator = random.Random(seed)
    made = []
    for number, row in enumerate(rows):
        shown = _shown(row, number)
        picked = _draw(len(shown), subsets, shots, generator, number)
        texts = [separator.join([*(shown[i] for i in one), row["prompt"]]) for one in picked]
        full = separator.join([*shown, row["prompt"]])
        made.append({"prompts": [full, *texts], "completions": [row["completion"]] * (subsets + 1)})
    asked = [{"prompt": text} for row in made for text in row["prompts"][1:]]
    answers = [row["completions"][0] for row in made for _ in row["prompts"][1:]]
    sums = [
        None if x is None else float(x.double().sum())
        for x in answer_logps(teacher, tokenizer, asked, answers, config)
    ]
    out = []
    for n, row in enumerate(made):
        own = sums[n * subsets : (n + 1) * subsets]
        if all(score is not None for score in own) and len(set(own)) > 1:
            out.append(row | {"scores": [None, *own]})
    if not out:
        raise ValueError(
            "the teacher reads or ranks none of the rows; raise max_length, or look at the rows."
        )
    return out


def _shown(row: Mapping[str, Any], number: int) -> list[str]:
    """A row's demonstrations as text."""
    given = row.get("demonstrations")
    texts = [row.get("prompt"), row.get("completion")]
    if isinstance(given, list | tuple):
        found = [
            f"{x.get('prompt', '')}{x.get('completion', '')}" if isinstance(x, Mapping) else x
            for x in given
        ]
        if found and all(isinstance(text, str) and text for text in (*found, *texts)):
            return found
    raise ValueError(
        f"row {number} must hold prompt, completion and a list of demonstrations, all plain text; "
        f"got the columns {sorted(row)}."
    )


def _draw(
    count: int, subsets: int, shots: int | None, generator: random.Random, number: int
) -> list[list[int]]:
    """Different subsets of `count` demonstrations, each in a random order."""
    if shots is not None and not 1 <= shots <= count:
        raise ValueError(f"shots must be in 1 to {count}, the demonstrations of row {number}.")
    found: list[list[int]] = []
    for _ in range(50 * subsets):
        one = generator.sample(range(count), shots or generator.randint(1, count))
        if one not in found and one != list(range(count)):  # the first entry has them all
            found.append(one)
        if len(found) == subsets:
            return found
    raise ValueError(
        f"row {number} has {count} demonstration(s), too few for {subsets} different subsets; give "
        "more, or lower subsets."
    )
