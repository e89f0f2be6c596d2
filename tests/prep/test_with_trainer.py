"""What the functions write is what the trainer reads."""

from __future__ import annotations

import pytest
from tiny_tokenizer import byte_tokenizer

from prefkern.prep import (
    control_prefix,
    curriculum,
    direction_conditioned,
    pair_weights,
    pairs_from_judgements,
    pairs_from_lists,
    rank_by_run_time,
    rank_programs,
    rejection_sample,
    score_conditioned,
    shared_steps_to_prompt,
    split_stages,
    system_messages,
    token_weights,
    tournament_pairs,
)

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from prefkern.train.data import Loader

LIST = {
    "prompt": "2 + 2 =",
    "completions": [" four", " five", " six", " ten"],
    "scores": [4.0, 3.0, 2.0, 1.0],
    "rewards": [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.2, 0.1]],
    "passed": [[1, 1], [1, 1], [0, 1], [0, 0]],
    "seconds": [2.0, 1.0, 1.0, 1.0],
    "pref_probs": [[0.5, 0.6, 0.7, 0.8], [0.4, 0.5, 0.6, 0.7], [0.3, 0.4, 0.5, 0.6],
                   [0.2, 0.3, 0.4, 0.5]],
}  # fmt: skip
PAIRS = pairs_from_lists([LIST])


@pytest.mark.parametrize(
    ("table", "layout", "count"),
    [
        (PAIRS, "pairs", 6),
        (curriculum([LIST]), "pairs", 3),
        (split_stages(curriculum([LIST]))[0], "pairs", 1),
        (pairs_from_judgements([LIST]), "pairs", 6),
        (tournament_pairs([LIST], rounds="all"), "pairs", 3),
        (score_conditioned(PAIRS), "pairs", 12),
        (control_prefix(PAIRS, good_prefix="good:", bad_prefix="bad:"), "pairs", 12),
        (rejection_sample([LIST], num_samples=3), "lists", 1),
        (rank_programs([LIST]), "lists", 1),
        (rank_by_run_time([LIST]), "lists", 1),
        (direction_conditioned([LIST], [(1, 0), (0, 1)], objectives="ab"), "lists", 2),
        (system_messages([LIST | {"system": "Be brief."}]), "lists", 1),
        (
            shared_steps_to_prompt(
                [{"prompt": "Q", "chosen_steps": ["a", "b"], "rejected_steps": ["a", "c"]}]
            ),
            "pairs",
            1,
        ),
    ],
)
def test_rows_are_read(table, layout, count):
    examples, found, report = Loader(tokenizer=byte_tokenizer(), strict=True).load(table)
    assert found == layout and len(examples) == count and report.total == 0


def test_weights_are_read():
    table = pair_weights(PAIRS[:1], [0.25])
    bytes_of = {f"{c}_ids": list(PAIRS[0][c].encode()) for c in ("chosen", "rejected")}
    table = token_weights([table[0] | bytes_of], lambda ids: [0.5] * len(ids))
    (example,) = Loader(tokenizer=byte_tokenizer(), strict=True).load(table).examples
    assert example.weight == 0.25
    # The end token may be left out of the weights and then counts 1.
    assert example.sequences[0].token_weights.tolist() == [0.5] * 5 + [1.0]
