"""Preference training in a plain PyTorch loop.

    python examples/plain_loop.py --model PATH --data pairs.jsonl

Rows of the data: prompt, chosen, rejected, one JSON object a line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefkern.integrations.collate import PairCollator
from prefkern.integrations.preference_model import PreferenceModel


def train(
    path: str, data: str, *, loss: str = "tdpo2", pairs: int = 4, rate: float = 5e-7
) -> list[float]:
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    collate = PairCollator(AutoTokenizer.from_pretrained(path), max_length=1024)
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    model = PreferenceModel(policy, loss, ref=reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses = []
    for start in range(0, len(rows), pairs):
        loss_value, metrics = model(**collate(rows[start : start + pairs]))
        loss_value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_value.item())
        print({name: round(value.item(), 4) for name, value in metrics.items()})
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    given = parser.parse_args()
    train(given.model, given.data)
