"""What stand-ins of libraries that are not installed have in common."""

from __future__ import annotations

import torch
import trl_runs as runs

from prefkern.integrations.collate import PairCollator


def halves(rows=4):
    """A batch of pairs, chosen rows first."""
    made = PairCollator(runs.tokenizer(), 40)([dict(row) for row in runs.pairs(rows)])
    order = torch.cat([torch.arange(0, 2 * rows, 2), torch.arange(1, 2 * rows, 2)])
    return {k: v[order] for k, v in made.items()}


def token_logps(logits, targets):  # [B, T, V], [B, T] shifted
    logp = logits.float().log_softmax(-1)
    picked = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return picked * (targets != -100)


def shift(labels):
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def same_gradients(mine, theirs):
    compared = 0
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5), name
        compared += 1
    assert compared > 10


class Plain:
    """What accelerate is asked for."""

    def unwrap_model(self, model):
        return model
