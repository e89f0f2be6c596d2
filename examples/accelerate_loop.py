"""Preference training in a loop of one's own under Accelerate.

    accelerate launch examples/accelerate_loop.py --model PATH --data pairs.jsonl

Rows of the data: prompt, chosen, rejected.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefkern.integrations.collate import PairCollator
from prefkern.integrations.preference_model import PreferenceModel


def train(
    path: str, data: str, *, loss: str = "tdpo2", pairs: int = 4, rate: float = 5e-7,
    accumulate: int = 1,
) -> list[float]:  # fmt: skip
    accelerator = Accelerator(gradient_accumulation_steps=accumulate)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    collate = PairCollator(AutoTokenizer.from_pretrained(path), max_length=1024)
    rows = load_dataset("json", data_files=data, split="train")
    loader = torch.utils.data.DataLoader(rows, batch_size=pairs, collate_fn=collate)  # type: ignore[arg-type]
    model = PreferenceModel(policy, loss, ref=reference.to(accelerator.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            out = model(**batch)
            accelerator.backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(out.loss.item())
        accelerator.print({name: round(value.item(), 4) for name, value in out.metrics.items()})
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    given = parser.parse_args()
    train(given.model, given.data)
