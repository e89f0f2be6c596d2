"""Heads sharded over the vocabulary: every statistic and gradient equals the whole head's."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import backends_on
from ranks import answers

from prefkern import Shard

WORKER = str(Path(__file__).with_name("sharded_worker.py"))
EVERY = backends_on("linear_logps")
NAMES = ("statistics", "values_of_ev", "padding", "ties", "narrow", "sizes", "distributed_tensors",
         "compiled", "tails")  # fmt: skip
# of three ranks: what differs between them, without the interpreter, which takes minutes
OF_THREE = ("statistics", "padding", "ties", "sizes")
CHECKS = [
    *((2, name, backend) for name in NAMES for backend in EVERY),
    (2, "kept_logits", "cpu"),
    (2, "refusals"),
    *((3, name, backend) for name in OF_THREE for backend in EVERY if backend != "triton"),
]


found = answers(WORKER, CHECKS, seconds=900)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: "-".join(map(str, c)))
def test_sharded_as_whole(found, check):
    world, *call = check
    if text := found(world)[tuple(call)]:
        pytest.fail(text, pytrace=False)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tokens": "both"}, "tokens must be one of"),
        ({"tokens": "same", "start": 0}, "group, start and total belong together"),
    ],
)
def test_what_a_shard_must_say(arguments, text):
    with pytest.raises(ValueError, match=text):
        Shard(**arguments)
