"""Three DPO runs that differ in `tail_mass` only: 0, 2^-10 and 2^-8, from one starting point.

    python examples/tail_mass.py                                  # the demonstration's task
    python examples/tail_mass.py --dataset train.jsonl.gz --eval-dataset test.jsonl.gz \
        --tokenizer FOLDER                                        # your pairs, your tokenizer

A small model with random weights first learns the likelihood of the chosen answers, then DPO. With
tail_mass = e the backward leaves out, per row, the chunks of 1,024 tokens that carry less than e of
the probability together (and spreads the head's share of them evenly over their chunk); loss and
metrics of a step stay exact. What differs afterwards is printed: the held-out loss and accuracy,
the largest difference of any logged loss, the share of the backward that was computed
(`perf/active_share`) and the CPU seconds. Curves of the three runs lie over each other in
OUTPUT/curves.png.

The demonstration has 110 words, one chunk, so its vocabulary is filled up to 16,384 tokens that
never occur: the model learns in the first steps that they carry nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prefkern.train import demo_task, train
from prefkern.train.config import TrainConfig
from prefkern.train.plots import PANELS, Panel, plot_history

TAIL_MASSES = {"0": 0.0, "2^-10": 2.0**-10, "2^-8": 2.0**-8}
SHARE = Panel(
    "active_share", "Computed part of the backward", "share",
    (("perf/active_share", "active"),), 1.0, (-0.02, 1.05),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", help="pairs (prompt, chosen, rejected); default the demo's")
    parser.add_argument("--eval-dataset", help="held-out pairs")
    parser.add_argument("--tokenizer", help="folder or name of its tokenizer")
    parser.add_argument("--vocabulary", type=int, default=16_384, help="of the demonstration")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--likelihood-epochs", type=float, default=4.0)
    parser.add_argument("--likelihood-learning-rate", type=float, default=2e-3)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("tail-mass"))
    args = parser.parse_args(arguments)
    if bool(args.dataset) != bool(args.tokenizer) or bool(args.dataset) != bool(args.eval_dataset):
        parser.error("--dataset, --eval-dataset and --tokenizer go together")
    args.output.mkdir(parents=True, exist_ok=True)

    if args.dataset:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        files = {name: args.dataset for name in ("likelihood", "pairs")}
        files["held_out"], size = args.eval_dataset, len(tokenizer)
    else:
        tokenizer, size = demo_task.make_tokenizer(), args.vocabulary
        files = demo_files(args.output, args.pairs)
    config = LlamaConfig(
        vocab_size=size, hidden_size=args.hidden, intermediate_size=2 * args.hidden,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=args.max_length, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(args.output / "random")
    tokenizer.save_pretrained(args.output / "random")
    shared: dict[str, Any] = dict(
        eval_dataset=files["held_out"], max_length=args.max_length, limit=args.pairs,
        eval_limit=200, per_device_train_batch_size=16, per_device_eval_batch_size=16,
        overwrite_output_dir=True, warmup_ratio=0.1, logging_steps=2, plots=False, device="cpu",
        disable_tqdm=True,
    )  # fmt: skip
    train(TrainConfig(
        model=str(args.output / "random"), dataset=files["likelihood"], loss=("sft",),
        output_dir=str(args.output / "likelihood"), num_train_epochs=args.likelihood_epochs,
        learning_rate=args.likelihood_learning_rate, **shared,
    ))  # fmt: skip
    runs = {}
    for name, tail_mass in TAIL_MASSES.items():
        started = time.process_time()
        last = train(TrainConfig(
            model=str(args.output / "likelihood"), dataset=files["pairs"], loss=("dpo",),
            output_dir=str(args.output / f"dpo-{name}"), num_train_epochs=args.epochs,
            learning_rate=args.learning_rate, tail_mass=tail_mass, **shared,
        ))  # fmt: skip
        runs[name] = (last["log_history"], time.process_time() - started)
    plot_history(
        {f"tail_mass {name}": rows for name, (rows, _) in runs.items()},
        args.output,
        panels=(*PANELS[:3], SHARE),
    )
    found = {name: summary(rows, runs["0"][0], cpu) for name, (rows, cpu) in runs.items()}
    (args.output / "summary.json").write_text(json.dumps(found, indent=2) + "\n")
    print(f"{'tail_mass':>10} " + " ".join(f"{key:>20}" for key in found["0"]))
    for name, row in found.items():
        print(f"{name:>10} " + " ".join(f"{value:20.5f}" for value in row.values()))
    return found


def demo_files(folder: Path, pairs: int) -> dict[str, str]:
    """Pairs whose chosen answer is a demonstration (half wrong), pairs, held-out pairs."""
    data = demo_task.make_data(0, pairs, pairs, 200)
    likelihood = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"] + " ."}
        for row in data.demonstrations
    ]
    files = {}
    for name, rows in (
        ("likelihood", likelihood),
        ("pairs", data.pairs),
        ("held_out", data.held_out),
    ):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[name] = str(path)
    return files


def summary(rows: list[dict], exact: list[dict], cpu_seconds: float) -> dict[str, float]:
    def values(log: list[dict], key: str) -> np.ndarray:
        return np.array([row[key] for row in log if key in row])

    share = values(rows, "perf/active_share")
    return {
        "held-out loss": float(values(rows, "eval_loss")[-1]),
        "held-out accuracy": float(values(rows, "eval_rewards/accuracies")[-1]),
        "loss, largest change": float(np.abs(values(rows, "loss") - values(exact, "loss")).max()),
        "active share": float(share.mean()) if len(share) else 1.0,
        "CPU seconds": cpu_seconds,
    }


if __name__ == "__main__":
    main()
