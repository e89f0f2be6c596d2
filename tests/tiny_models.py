"""Tiny random models of several families, tiny data, and a trainer configuration around them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizer import byte_tokenizer

from prefkern.train.config import TrainConfig

STORIES = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCAB = 260
_SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


def tiny_model(family: str = "llama", seed: int = 0, **options: Any) -> Any:
    """A causal model with random weights, large enough logits to tell right from wrong."""
    import transformers as t

    makers = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_SMALL | options)),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(
                **_SMALL
                | dict(head_dim=8, final_logit_softcapping=3.0, sliding_window=16)
                | options
            )
        ),
        "granite": lambda: t.GraniteForCausalLM(
            t.GraniteConfig(**_SMALL | dict(logits_scaling=4.0) | options)
        ),
        "cohere": lambda: t.CohereForCausalLM(
            t.CohereConfig(**_SMALL | dict(logit_scale=0.25) | options)
        ),
        "hyperclovax": lambda: t.HyperCLOVAXForCausalLM(
            t.HyperCLOVAXConfig(**_SMALL | dict(logits_scaling=0.5) | options)
        ),
        "minicpm3": lambda: t.MiniCPM3ForCausalLM(
            t.MiniCPM3Config(
                **_SMALL
                | dict(
                    num_key_value_heads=4,
                    q_lora_rank=16,
                    kv_lora_rank=16,
                    qk_nope_head_dim=8,
                    qk_rope_head_dim=8,
                    v_head_dim=8,
                    dim_model_base=8,
                )
                | options
            )
        ),
        "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**_SMALL | options)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, **options
            )
        ),
        "mpt": lambda: t.MptForCausalLM(
            t.MptConfig(
                vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, max_seq_len=128, **options
            )
        ),
    }
    torch.manual_seed(seed)
    model = makers[family]()
    return with_large_logits(model)


def with_large_logits(model: Any) -> Any:
    """The model, evaluating, with logits large enough to tell right from wrong."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_(std=0.3)
        if getattr(head, "bias", None) is not None:
            head.bias.normal_(std=0.3)
    return model.eval()


def save_model(
    folder: Path, family: str = "llama", seed: int = 0, *, pad: str | None = None, **options: Any
) -> str:
    """Model and byte tokenizer in a folder that from_pretrained reads."""
    tiny_model(family, seed, **options).save_pretrained(folder)
    byte_tokenizer(pad=pad).save_pretrained(folder)
    return str(folder)


def write_data(path: Path, layout: str = "pairs", rows: int = 12, seed: int = 0) -> str:
    """JSON lines of short random texts of unequal length."""
    rng = random.Random(seed)

    def text(low: int = 3, high: int = 12) -> str:
        return (
            "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(low, high))).strip() or "a"
        )

    def row(i: int) -> dict[str, Any]:
        prompt = f"{i}:{text()}"
        if layout == "pairs":
            return {"prompt": prompt, "chosen": " " + text() + "y", "rejected": " " + text() + "n"}
        if layout == "unpaired":
            return {"prompt": prompt, "completion": " " + text(), "label": bool(rng.random() < 0.5)}
        size = rng.randint(2, 4)
        return {
            "prompt": prompt,
            "responses": [f" {text()}{k}" for k in range(size)],
            "scores": list(range(size)),
        }

    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(rows)))
    return str(path)


def config(folder: Path, model: str, dataset: str, **options: Any) -> TrainConfig:
    """A short, quiet CPU run; `options` override."""
    base = dict(
        model=model,
        dataset=dataset,
        output_dir=str(folder),
        max_length=64,
        device="cpu",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=5,
        learning_rate=1e-3,
        logging_steps=1,
        save_steps=0,
        plots=False,
        disable_tqdm=True,
        max_steps=3,
    )
    return TrainConfig(**base | options)
