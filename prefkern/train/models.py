"""Loading policy, reference and tokenizer; hashing weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..integrations import hf
from .config import TrainConfig

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# Plain float attributes that modelling files hand to functional dropout or attention.
_DROPOUT_ATTRIBUTES = (
    "dropout", "attention_dropout", "attn_dropout", "hidden_dropout", "resid_dropout",
    "activation_dropout", "dropout_p", "dropout_prob", "attn_pdrop",
)  # fmt: skip


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or hub name."""
    from transformers import AutoTokenizer

    if name.startswith(("/", "./", "../", "~")) and not Path(name).is_dir():
        raise ValueError(f"there is no model folder {name}.")  # no five retries against the hub
    return AutoTokenizer.from_pretrained(name)


def load_causal_lm(name: str, config: TrainConfig) -> hf.Model:
    """A transformers causal model with its weights in `config.dtype`."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    return AutoModelForCausalLM.from_pretrained(name, **options)


def load_model(name: str, config: TrainConfig, *, trainable: bool = False) -> hf.Model:
    """A model folder or hub name; with adapter_config.json in it, base plus PEFT adapter."""
    if not (Path(name) / "adapter_config.json").is_file():
        return load_causal_lm(name, config)
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    return PeftModel.from_pretrained(load_causal_lm(base, config), name, is_trainable=trainable)


def load_policy(config: TrainConfig, checkpoint: Path | None) -> hf.Model:
    """The model to train: fresh, with a new adapter if asked for, or as a checkpoint left it."""
    model = load_model(str(checkpoint or config.model), config, trainable=True)
    if config.lora_r and not hasattr(model, "peft_config"):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(config.seed)  # whatever loading drew, the adapter starts the same
        model = get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=list(config.lora_target_modules) or "all-linear",
            ),
        )
    if config.disable_dropout:
        disable_dropout(model)
    if config.gradient_checkpointing:
        # non-reentrant: works with frozen embeddings and keeps DDP's hooks in order
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        enable = getattr(inner, "activation_checkpointing_enable", None)  # the name since 5.2x
        (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.train()


def freeze(model: hf.Model) -> hf.Model:
    return model.requires_grad_(False).eval()


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0, in modules and in attributes of attention layers."""
    for module in model.modules():
        if isinstance(module, _DROPOUTS):
            module.p = 0.0
        for name in _DROPOUT_ATTRIBUTES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, types and bytes of all parameters and persistent buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def context_length(model: hf.Model) -> int | None:
    """Positions the model was built for, None where its config does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def autocast(config: TrainConfig, device_type: str) -> torch.autocast:
    """The compute type of policy, reference and losses alike."""
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=config.bf16)
