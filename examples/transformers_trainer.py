"""Preference training under transformers' Trainer.

    python examples/transformers_trainer.py --model PATH --data pairs.jsonl

Rows of the data: prompt, chosen, rejected. `Trainer` averages the loss over accumulation steps and
ranks; the metrics go to its log.
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from prefkern.integrations.collate import PairCollator
from prefkern.integrations.preference_model import PreferenceModel


class PreferenceTrainer(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        out = model(**inputs)  # the wrapped model: the loss is inside its forward
        if self.state.global_step % self.args.logging_steps == 0:
            self.log({name: value.item() for name, value in out.metrics.items()})
        return (out.loss, {"loss": out.loss}) if return_outputs else out.loss


def train(path: str, data: str, output: str, *, loss: str = "tdpo2", **options: Any) -> Trainer:
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainer = PreferenceTrainer(
        model=PreferenceModel(policy, loss, ref=reference),
        args=TrainingArguments(output, remove_unused_columns=False, **options),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        data_collator=PairCollator(tokenizer, max_length=1024),
    )
    trainer.train()
    trainer.model.save_pretrained(output)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", default="trained")
    given = parser.parse_args()
    train(given.model, given.data, given.output)
