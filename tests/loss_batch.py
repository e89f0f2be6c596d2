"""A tiny batch and everything that any loss of LOSSES asks its caller for."""

from __future__ import annotations

import torch

from prefkern import losses, preference_loss
from prefkern.stats import SeqStats

S, T, D, V = 6, 5, 4, 11


def cu(*bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def answers(*logratios, length=8.0, **fields):
    """Sequences of these log-ratios, the reference at -20 nats."""
    logratio = torch.tensor(logratios, dtype=torch.float64)
    reference = torch.full_like(logratio, -20.0)
    return SeqStats(
        logp=(reference + logratio).requires_grad_(), ref_logp=reference,
        length=torch.full_like(logratio, length),
        **{k: torch.tensor(v, dtype=torch.float64) for k, v in fields.items()},
    )  # fmt: skip


class Batch:
    """Six sequences of up to five tokens: three pairs, or two lists of three."""

    def __init__(self, dtype=torch.float32):
        g = torch.Generator().manual_seed(3)
        self.hidden = torch.randn(S, T, D, generator=g, dtype=dtype).requires_grad_()
        self.weight = torch.randn(V, D, generator=g, dtype=dtype).requires_grad_()
        self.targets = torch.randint(0, V, (S, T), generator=g)
        self.targets[:, 0] = -100
        self.targets[1, 3:] = -100
        self.ref = torch.randn(S, T, D, generator=g, dtype=dtype)

    def given(self, name: str) -> dict:
        """A value for everything the loss asks the caller for."""
        n, g = S * T, torch.Generator().manual_seed(4)
        token = -torch.rand(n, generator=g)
        many = {
            "desirable": None, "kl_baseline": torch.tensor(0.2), "delta": torch.tensor(0.1),
            "rm_margin": torch.randn(3, generator=g), "keep": torch.tensor([True, False, True]),
            "margin_reward_chosen": torch.randn(3, 1, generator=g),
            "margin_reward_rejected": torch.randn(3, 1, generator=g),
            "pref_prob": torch.rand(3, generator=g),
            "baseline_mean_logps": -torch.rand(S, generator=g),
            "source_chosen_mean_logps": -torch.rand(3, 2, generator=g),
            "source_rejected_mean_logps": -torch.rand(3, 2, generator=g),
            "slow_chosen_logps": -torch.rand(3, generator=g),
            "slow_rejected_logps": -torch.rand(3, generator=g),
            "judge_logit_gap": torch.randn(3, generator=g),
            "score_chosen": torch.tensor([8.0, 6.0, 9.0]), "score_rejected": torch.rand(3) * 5,
            "log_target_prob": -torch.rand(S, generator=g) * 9,
            "source": torch.tensor([1, 0]), "source_weights": torch.tensor([0.3, 0.7]),
            "topk": 2, "pairs": torch.tensor([[0, 1], [0, 2], [4, 3]]),
            "advantages": torch.randn(S, generator=g),
            "preference_levels": torch.tensor([1, 2, 2, 3, 1, 1]),
            "oracle_logp": token.reshape(S, T), "oracle_ref_logp": token.flip(0).reshape(S, T),
            "value": torch.randn(S, T, generator=g), "reward": torch.randn(S, generator=g),
            "positive_logp": token.reshape(S, T), "negative_logp": token.flip(0).reshape(S, T),
            "step_index": (torch.arange(n) % T).reshape(S, T), "cosine": token.reshape(S, T),
            "step_reward": token.reshape(S, T),
            "aux_logp": token.reshape(S, T), "reward_mask": torch.rand(S, T, generator=g).flatten(),
            "kl_mask": torch.rand(S, T, generator=g).flatten(),
            "activations": torch.rand(2, n, generator=g), "hook_type": torch.tensor([0, 1]),
        }  # fmt: skip
        record = losses.LOSSES[name]
        found = {k: many[k] for k in losses.required(record) if many.get(k) is not None}
        if name == "adpa":
            found |= {"aux_hidden": self.ref.flip(0), "aux_head": self.weight.detach()}
        if "cu_segments" in losses.arguments(record):
            found["step_index"] = many["step_index"]
        return found

    def arguments(self, name: str, **args) -> dict:
        """Keywords of preference_loss for a loss, `args` above them."""
        record = losses.LOSSES[name]
        if record.family == "listwise":
            args["relevance"] = torch.tensor([2.0, 0.0, 1.0, 0.5, 0.5, 3.0])
        elif "desirable" in record.extra:
            args["desirable"] = torch.tensor([True, False, True, True, False, False])
        grouped = record.family == "listwise" or "cu_groups" in record.extra
        groups = cu(0, 3, 6) if grouped else None
        if "cu_segments" in losses.arguments(record):  # of pairs
            groups = cu(0, 2, 4, 6)
        return {"ref_hidden": self.ref, "cu_groups": groups, **self.given(name), **args}

    def __call__(self, name: str, loss=None, **args):
        """`loss`: a record that stands in for the loss of that name."""
        given = self.arguments(name, **args)
        return preference_loss(self.hidden, self.weight, self.targets, loss=loss or name, **given)
