"""Heads sharded over the vocabulary: every statistic and gradient equals the whole head's."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks

from prefkern import Shard

WORKER = str(Path(__file__).with_name("sharded_worker.py"))


@pytest.mark.parametrize("world", [2, 3])
def test_every_statistic_and_gradient(tmp_path, backend, world):
    if backend == "triton" and world == 3:
        pytest.skip("the interpreter takes minutes; two ranks cover the driver")
    run_ranks(tmp_path, WORKER, "statistics", world, backend, seconds=240)


def test_a_head_as_a_distributed_tensor(tmp_path, backend):
    run_ranks(tmp_path, WORKER, "distributed_tensors", 2, backend)


def test_ranks_skip_the_tail_by_their_common_masses(tmp_path, backend):
    run_ranks(tmp_path, WORKER, "tails", 2, backend)


def test_in_compiled_code(tmp_path, backend):
    run_ranks(tmp_path, WORKER, "compiled", 2, backend)


def test_shards_that_do_not_fit_are_refused_on_every_rank(tmp_path):
    run_ranks(tmp_path, WORKER, "refusals", 2, "eager")


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
