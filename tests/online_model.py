"""A tiny model that answers `p:` with a few letters a and b and an end, and data around it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tiny_models import config, save_model

from prefkern.train import train

# Wanted: the letter a. Called with a row of the prompts' file and the answers to it.
JUDGE = """
def share_of_a(row, answers):
    return [text.count("a") / len(text) for text in answers]

def by_direction(row, answers):
    more_a, more_b = row["direction"]
    return [(more_a * x.count("a") + more_b * x.count("b")) / len(x) for x in answers]

def same(row, answers):
    return [0.0] * len(answers)

def too_few(row, answers):
    return [1.0]
"""


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def letters_model(folder: Path, rate: float = 0.5, seed: int = 0) -> str:
    """A model trained by likelihood on answers whose letters are `a` at this rate."""
    rng = random.Random(seed)
    rows = [
        {
            "prompt": rng.choice("pqrs") + ":",
            "chosen": "".join(
                "a" if rng.random() < rate else "b" for _ in range(rng.randint(2, 6))
            ),
            "rejected": "zz",
        }
        for _ in range(64)
    ]
    data = write_rows(folder / f"letters{seed}.jsonl", rows)
    start = save_model(folder / f"start{seed}", seed=seed)
    out = folder / f"letters{seed}"
    options = dict(loss=("sft",), max_steps=60, learning_rate=1e-2, logging_steps=60)
    train(config(out, start, data, per_device_train_batch_size=16, **options))
    return str(out)


def write_two_rounds(folder: Path, name: str) -> None:
    """The settings of an online run of two rounds, whose reference moves, as a file of `folder`."""
    (folder / "judge.py").write_text(JUDGE)
    prompts = write_rows(folder / "p.jsonl", [{"prompt": f"{x}:"} for x in "pqrst"] * 3)
    settings = config(
        folder / "out", letters_model(folder), prompts, round_data="online", num_rounds=2,
        judge=f"{folder}/judge.py:share_of_a", num_generations=4, max_new_tokens=10, max_steps=5,
        learning_rate=3e-3, per_device_train_batch_size=8, sync_ref_model=True,
        ref_model_sync_steps=2,
    )  # fmt: skip
    (folder / name).write_text(json.dumps(settings.as_dict()))
