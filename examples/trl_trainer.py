"""TRL's trainer on prefkern: change the import, keep the script, take any loss.

python examples/trl_trainer.py
"""

from __future__ import annotations

import copy
import tempfile

import tiny
from datasets import Dataset

from prefkern.integrations.trl import DPOConfig, DPOTrainer  # instead of trl's


def main(pairs: int = 256) -> dict[str, float]:
    policy = tiny.start()
    reference, held_out = copy.deepcopy(policy), tiny.pairs(100, seed=1)
    before = tiny.accuracy(policy, held_out)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            policy,
            reference,
            args=DPOConfig(
                output_dir=folder, loss_type=["tdpo2", "sft"], loss_weights=[1, 0.1],
                loss_args={"alpha": 0.5, "beta": 0.5}, per_device_train_batch_size=16,
                learning_rate=1e-3, logging_steps=4, report_to=[], save_strategy="no",
                max_length=64, bf16=False, use_cpu=True, disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(tiny.pairs(pairs)),
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
        trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    found = {
        "before": before,
        "after": tiny.accuracy(policy, held_out),
        "first_margin": log[0]["rewards/margins"],
        "last_margin": log[-1]["rewards/margins"],
    }
    print({name: round(value, 3) for name, value in found.items()})
    return found


if __name__ == "__main__":
    main()
