"""A plain PyTorch DPO loop on full logits, the same loop without them, and TDPO2 by one word.

    python examples/dpo_to_tdpo2.py

The first two loops give the same losses. The third keeps the policy's whole distribution near the
reference, token by token, which needs no further pass over the vocabulary.
"""

from __future__ import annotations

import copy

import tiny
import torch

from prefkern.integrations.collate import PairCollator
from prefkern.integrations.head_view import shifted
from prefkern.integrations.preference_model import PreferenceModel

BETA = 0.5


class FullLogits(torch.nn.Module):
    """DPO as it is usually written."""

    def __init__(self, policy, reference):
        super().__init__()
        self.policy, self.reference = policy, [reference]

    def sums(self, model, inputs, targets):
        logp = model(**inputs).logits.log_softmax(-1)  # [2P, T, V] in memory
        token = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return token.masked_fill(targets == -100, 0.0).sum(-1)

    def forward(self, labels, **inputs):
        targets = shifted(labels)
        with torch.no_grad():
            reference = self.sums(self.reference[0], inputs, targets)
        ratio = self.sums(self.policy, inputs, targets) - reference
        return torch.nn.functional.softplus(-BETA * (ratio[0::2] - ratio[1::2])).mean(), {}


@torch.no_grad()
def drift(policy, reference, rows):
    """KL(reference to policy) per rejected answer."""
    step = PreferenceModel(policy, "tdpo2", ref=reference)
    return step(**PairCollator(tiny.tokenizer())(rows)).metrics["kl/rejected"].item()


def main(pairs: int = 320) -> dict[str, dict]:
    begin = tiny.start()
    train, held_out = tiny.pairs(pairs), tiny.pairs(100, seed=1)
    steps = {
        "dpo, full logits": lambda policy, ref: FullLogits(policy, ref),
        "dpo": lambda policy, ref: PreferenceModel(policy, "dpo", ref=ref, beta=BETA),
        "tdpo2": lambda policy, ref: PreferenceModel(
            policy, "tdpo2", ref=ref, beta=BETA, alpha=2.0
        ),
    }
    found = {}
    for name, step in steps.items():
        policy, reference = copy.deepcopy(begin), copy.deepcopy(begin)
        outputs = tiny.fit(step(policy, reference), train, rate=1e-3)
        found[name] = {
            "losses": [loss.item() for loss, _ in outputs],
            "before": tiny.accuracy(begin, held_out),
            "after": tiny.accuracy(policy, held_out),
            "kl": drift(policy, reference, held_out),
        }
        row = found[name]
        print(
            f"{name:18s} loss {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}   "
            f"held-out accuracy {row['before']:.2f} to {row['after']:.2f}   "
            f"KL of a rejected answer {row['kl']:.2f}"
        )
    return found


if __name__ == "__main__":
    main()
