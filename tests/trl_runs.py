"""Short runs of TRL's trainers on tiny models, and what two of them must have in common."""

from __future__ import annotations

import copy
import math
import os
import random
from pathlib import Path
from typing import Any

os.environ |= {"CI": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

import datasets
import torch
from tiny_tokenizer import byte_tokenizer

import prefkern.integrations  # noqa: F401  (hides the source folder `kernels` from transformers)

datasets.disable_caching()  # a precomputed reference would pass from one run to the next
datasets.disable_progress_bars()

_SMALL = dict(
    vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, head_dim=8,
)  # fmt: skip


def tokenizer(side: str = "right") -> Any:
    return byte_tokenizer(pad="<pad>", padding_side=side)


def model(family: str = "llama", seed: int = 0, **options: Any) -> Any:
    """Weights large enough for log-ratios of a few nats within ten steps."""
    import transformers as t

    kinds = {
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, {}),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config, {"final_logit_softcapping": 5.0}),
        "mixtral": (
            t.MixtralForCausalLM, t.MixtralConfig,
            {"num_local_experts": 4, "output_router_logits": True},
        ),
        "phi": (t.PhiForCausalLM, t.PhiConfig, {"num_key_value_heads": 4}),
    }  # fmt: skip
    cls, config, own = kinds[family]
    torch.manual_seed(seed)
    made = cls(config(**_SMALL | own | {"initializer_range": 0.1} | options))
    if family == "phi":  # a head with a bias
        with torch.no_grad():
            made.lm_head.bias.normal_(std=0.5)
    return made


def perturbed(policy: Any, scale: float = 0.02) -> Any:
    """Another model near the policy: a reference that tells log-ratios from log-probabilities."""
    other = copy.deepcopy(policy).requires_grad_(False)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return other


def _text(rng: random.Random, low: int = 3, high: int = 14) -> str:
    return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(low, high))).strip() or "a"


def pairs(rows: int = 24, **columns: Any) -> Any:
    """`columns`: name -> function of the row's number."""
    from datasets import Dataset

    rng = random.Random(0)
    data = [
        {"prompt": f"{i}:{_text(rng)}", "chosen": " " + _text(rng), "rejected": " " + _text(rng)}
        | {name: value(i) for name, value in columns.items()}
        for i in range(rows)
    ]
    return Dataset.from_list(data)


def answers(rows: int = 24) -> Any:
    from datasets import Dataset

    rng = random.Random(1)
    data = [
        {"prompt": f"{i}:{_text(rng)}", "completion": " " + _text(rng), "label": i % 3 != 0}
        for i in range(rows)
    ]
    return Dataset.from_list(data)


def lists(rows: int = 12, **columns: Any) -> Any:
    from datasets import Dataset

    rng = random.Random(2)
    data = []
    for i in range(rows):
        size = rng.randint(2, 4)
        row = {
            "prompt": f"{i}:{_text(rng)}",
            "completions": [" " + _text(rng) for _ in range(size)],
            "scores": [float(s) for s in rng.sample(range(5), size)],
        }
        data.append(row | {name: value(i, size) for name, value in columns.items()})
    return Dataset.from_list(data)


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    """Arguments of a configuration: ten quiet steps in fp32 on the CPU."""
    base = dict(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=4, learning_rate=1e-3,
        logging_steps=1, bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False,
        save_strategy="no", seed=42, disable_tqdm=True, dataloader_pin_memory=False,
        max_length=48,
    )  # fmt: skip
    return base | options


# Of a log row, what is a time or the same in every run.
_NOT_COMPARED = ("runtime", "per_second", "total_flos", "epoch", "step")


def history(trainer: Any) -> list[dict[str, float]]:
    """The trained run's log, numbers that a second run must repeat."""
    rows = []
    for row in trainer.state.log_history:
        rows.append({
            k: v for k, v in row.items()
            if isinstance(v, float | int) and not any(part in k for part in _NOT_COMPARED)
        })  # fmt: skip
    return rows


def assert_same_runs(got: Any, want: Any, *, rtol: float = 2e-4, atol: float = 2e-5) -> None:
    """Every logged number of every step, and every trained weight at the end."""
    mine, theirs = history(got), history(want)
    assert len(mine) == len(theirs) >= 5
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert b.keys() <= a.keys(), f"row {i}: {sorted(b.keys() - a.keys())} is not logged"
        for name, value in b.items():
            near = math.isclose(a[name], value, rel_tol=rtol, abs_tol=atol)
            assert near, f"row {i}, {name}: {a[name]} against {value}"
    ours = dict(got.model.named_parameters())
    moved = 0
    for name, p in want.model.named_parameters():
        difference = (ours[name] - p).abs().max().item()
        assert difference < 2e-4, f"{name}: {difference}"
        moved += p.requires_grad
    assert moved
