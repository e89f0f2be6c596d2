"""Preference training under Lightning.

    python examples/lightning_module.py --model PATH --data pairs.jsonl

Rows of the data: prompt, chosen, rejected. `training_step` runs inside the wrapped forward, so
gradients of all devices are synchronised.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefkern.integrations.collate import PairCollator
from prefkern.integrations.preference_model import PreferenceModel


class Preferences(lightning.LightningModule):
    def __init__(self, path: str, loss: str, rate: float) -> None:
        super().__init__()
        policy, reference = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
        self.rate = rate
        self.step = PreferenceModel(policy, loss, ref=reference)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss, metrics = self.step(**batch)
        self.log_dict({"loss": loss, **metrics}, batch_size=len(batch["input_ids"]) // 2)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


def train(
    path: str, data: str, *, loss: str = "tdpo2", pairs: int = 4, rate: float = 5e-7, **options: Any
) -> Preferences:
    rows: Any = load_dataset("json", data_files=data, split="train")
    collate = PairCollator(AutoTokenizer.from_pretrained(path), max_length=1024)
    loader = torch.utils.data.DataLoader(rows, batch_size=pairs, collate_fn=collate)
    module = Preferences(path, loss, rate)
    lightning.Trainer(max_epochs=1, **options).fit(module, loader)
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    given = parser.parse_args()
    train(given.model, given.data)
