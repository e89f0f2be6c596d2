"""Sequences split over ranks give the loss and the gradients of whole ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from prefkern import SeqStats
from prefkern.integrations.context_parallel import reduce_sequences

WORKER = str(Path(__file__).with_name("context_worker.py"))


@pytest.mark.parametrize("world", [2, 3])
def test_a_split_sequence_is_a_whole_one(tmp_path, world):
    run_ranks(tmp_path, WORKER, "reduced", world)


def test_bad_input():
    seq = SeqStats(logp=torch.zeros(2))
    with pytest.raises(ValueError, match="single process"):
        reduce_sequences(seq)
    with pytest.raises(ValueError, match=r"one of \('mean', 'sum'\)"):
        reduce_sequences(seq, gradients="average")
