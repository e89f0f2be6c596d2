"""A rank of the test of PreferenceModel under DistributedDataParallel."""

from __future__ import annotations

import torch
import torch.distributed as dist
import trl_runs as runs

from prefkern.integrations.collate import PairCollator
from prefkern.integrations.preference_model import PreferenceModel


def made() -> PreferenceModel:
    policy = runs.model()
    return PreferenceModel(policy, "tdpo2", ref=runs.perturbed(policy))


def ddp() -> None:
    """Gradients of two ranks of two pairs are those of four pairs; a call of the module inside the
    wrapper leaves each rank its own."""
    rows = [dict(row) for row in runs.pairs(4)]
    collate, rank = PairCollator(runs.tokenizer(), 32), dist.get_rank()
    whole = made()
    whole(**collate(rows)).loss.backward()
    want = {name: p.grad for name, p in whole.named_parameters()}
    mine = collate(rows[2 * rank : 2 * rank + 2])
    model = torch.nn.parallel.DistributedDataParallel(made())
    model(**mine).loss.backward()
    for name, p in model.module.named_parameters():
        assert torch.allclose(p.grad, want[name], rtol=1e-3, atol=1e-6), name
    model.zero_grad()
    model.module(**mine).loss.backward()
    wrong = [
        not torch.allclose(p.grad, want[name], rtol=1e-3, atol=1e-6)
        for name, p in model.module.named_parameters()
    ]
    assert all(wrong), "the mutation was not seen"
