"""LoRA on attention and on the head; the reference is the same model with its adapter switched off.

    python examples/lora_with_head.py

The adapter's part of the logits is added tile by tile, as two thin factors: the head is never
copied, and its frozen weight gets no gradient.
"""

from __future__ import annotations

import peft
import tiny
import torch

from prefkern.integrations.preference_model import PreferenceModel


def main(pairs: int = 320) -> dict[str, float]:
    base = tiny.start()
    train, held_out = tiny.pairs(pairs), tiny.pairs(100, seed=1)
    frozen = base.lm_head.weight.detach().clone()
    before = tiny.accuracy(base, held_out)
    lora = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "lm_head"], task_type="CAUSAL_LM"
    )
    policy = peft.get_peft_model(base, lora)
    step = PreferenceModel(policy, "dpo", beta=0.5)  # no ref: the base is the reference
    outputs = tiny.fit(step, train, rate=1e-2)
    head = policy.get_base_model().lm_head
    found = {
        "before": before,
        "after": tiny.accuracy(policy, held_out),
        "first_loss": outputs[0].loss.item(),
        "last_loss": outputs[-1].loss.item(),
        "trained_share": sum(p.numel() for p in policy.parameters() if p.requires_grad)
        / sum(p.numel() for p in policy.parameters()),
        "head_adapter": head.lora_B["default"].weight.abs().max().item(),
        "head_moved": (head.base_layer.weight - frozen).abs().max().item(),
    }
    with torch.no_grad(), policy.disable_adapter():
        found["without_adapter"] = tiny.accuracy(policy, held_out)
    for name, value in found.items():
        print(f"{name:16s} {value:.4f}")
    return found


if __name__ == "__main__":
    main()
