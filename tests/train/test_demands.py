"""What losses ask of a run: their layout, the answer of likelihood terms, denominators."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import config

from prefkern.losses import LOSSES
from prefkern.train.data import Encoded, Example
from prefkern.train.demands import (
    check_layout,
    check_loss_args,
    count_items,
    likelihood_row,
    losses_of,
    wanted_layout,
    whole_row,
)


def example(prompt: int, *lengths: int) -> Example:
    sequences = tuple(Encoded(np.arange(prompt + n, dtype=np.int32), prompt) for n in lengths)
    return Example(row=0, sequences=sequences)


def test_denominators_of_a_step():
    triples = [example(2, 3, 5, 7), example(4, 1, 2, 6)]
    assert count_items(triples) == {
        "pairs": 2, "groups": 2, "sequences": 6, "tokens": 3 + 1, "scored_tokens": 24,
    }  # fmt: skip
    # of the third answer; with its prompt all but the first token are predicted
    assert count_items(triples, 2)["tokens"] == 7 + 6
    assert count_items(triples, 2, whole=True)["tokens"] == (2 + 7 - 1) + (4 + 6 - 1)


def test_the_answer_that_likelihood_terms_score():
    assert likelihood_row([LOSSES["orpo"]]) == likelihood_row([LOSSES["dpo"]]) == 0
    assert likelihood_row([LOSSES["tpo"]]) == 2  # gold
    with pytest.raises(ValueError, match="likelihood terms of different answers"):
        likelihood_row([LOSSES["tpo"], LOSSES["orpo"]])
    run = config("o", "m", "d", loss=("orpo",), likelihood_prompt=True)
    assert whole_row([LOSSES["orpo"]], run) == 0
    assert whole_row([LOSSES["orpo"]], config("o", "m", "d", loss=("orpo",))) is None


def test_layouts():
    names = {
        "dpo": "pairs", "lipo": "lists", "kto": "unpaired", "grpo": None, "distill": None,
    }  # fmt: skip
    assert {name: wanted_layout(LOSSES[name]) for name in names} == names
    check_layout([LOSSES["grpo"], LOSSES["dpo"]], "pairs")
    for name, layout in (("dpo", "lists"), ("lipo", "pairs"), ("kto", "pairs")):
        with pytest.raises(ValueError, match=f"loss {name!r} is .* but the data are {layout}"):
            check_layout([LOSSES[name]], layout)


def test_hyper_parameters_belong_to_a_loss_or_to_a_provider():
    run = config("o", "m", "d", loss_args={"beta": 0.2, "rho": 0.5})
    check_loss_args(run, [LOSSES["dpo"]], {"rho"})
    with pytest.raises(ValueError, match="loss dpo has no argument 'rho'"):
        check_loss_args(run, [LOSSES["dpo"]], set())


def test_losses_by_name():
    found = losses_of(config("o", "m", "d", loss=("sigmoid", "sft")))
    assert [record.name for record in found] == ["dpo", "sft"]
    with pytest.raises(ValueError, match="has no language-model head"):
        losses_of(config("o", "m", "d", loss=("diff_dpo",)))
