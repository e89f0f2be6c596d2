"""The policy of `--head reward`: a sequence-classification model, from one or from a causal model.

B texts of a batch, T tokens, n outputs, D inputs of the layer that makes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....integrations import hf
from ... import models, noise
from ...config import TrainConfig
from ...data import PreferenceBatch
from ...stored.reward_model import ENDS, SCORES


def load_reward_policy(config: TrainConfig, checkpoint: Path | None) -> tuple[hf.Model, list[str]]:
    """The model to train, and the weights of its scores that were drawn because the checkpoint has
    none: those of a causal model.

    Raises:
        ValueError: other weights are missing; a model with another number of outputs.
    """
    name = str(checkpoint or config.model)
    base = models.adapter_base(name) if models.is_adapter(name) else name
    model, drawn = _load_base(base, config)
    if models.is_adapter(name):
        from peft import PeftConfig, PeftModel

        with models.told(name, "adapter"):
            kind = PeftConfig.from_pretrained(name).task_type
        if kind != "SEQ_CLS":
            raise ValueError(
                f"{name} is an adapter of task {kind}, and head=reward trains on one of SEQ_CLS "
                "only; merge the adapter into its base (merge_and_unload) and pass the result."
            )
        with models.told(name, "adapter"):
            model, drawn = PeftModel.from_pretrained(model, name, is_trainable=True), []
            models.check_adapter(model, name)
    elif config.lora_r:
        model = models.with_adapter(model, config, "SEQ_CLS")
    if config.gradient_checkpointing:
        inner = hf.causal_lm(model)
        enable = getattr(inner, "activation_checkpointing_enable", None)
        (enable or inner.gradient_checkpointing_enable)({"use_reentrant": False})
    if config.disable_dropout:
        noise.silence(model)
    return model.train(), drawn


def _load_base(name: str, config: TrainConfig) -> tuple[hf.Model, list[str]]:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    models.check_name(name)
    with models.told(name):
        settings = AutoConfig.from_pretrained(name, trust_remote_code=False)
    kinds = getattr(settings, "architectures", None) or []
    fresh = not any("SequenceClassification" in kind for kind in kinds)
    outputs = config.num_outputs or (1 if fresh else settings.num_labels)
    if not fresh and outputs != settings.num_labels:
        raise ValueError(
            f"num_outputs={outputs}, and {name} has {settings.num_labels} outputs; drop "
            "num_outputs."
        )
    drawn: list[str] = []

    def may_lack(key: str) -> bool:
        """Of a causal model, what makes the scores."""
        own = fresh and SCORES.search(key) is not None
        drawn.extend([key] if own else [])
        return own

    model = models.load_whole(
        AutoModelForSequenceClassification, name, config, may_lack=may_lack, num_labels=outputs
    )
    draw(model, drawn, config.seed)
    return model, drawn


@torch.no_grad()
def draw(model: hf.Model, names: list[str], seed: int) -> None:
    """Weights with standard deviation 1 / sqrt(D + 1), so that scores start with a variance of
    about 1 (arXiv 2009.01325), biases 0: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name in sorted(names):
        weight = parameters[name]
        if weight.dim() < 2:
            weight.zero_()
        else:
            values = torch.randn(weight.shape, generator=generator)
            weight.copy_(values / math.sqrt(weight.shape[1] + 1))


def settle(model: hf.Model, tokenizer: Any, pad_id: int, append_eos: bool) -> None:
    """Notes in the model's config what a later reader must do alike: the pad token, behind which
    the score is not read, and whether plain texts end with EOS."""
    settings = hf.causal_lm(model).config
    rows = model.get_input_embeddings().weight.shape[0]
    known = getattr(settings, "pad_token_id", None)
    settings.pad_token_id = known if known is not None and 0 <= known < rows else pad_id
    setattr(settings, ENDS, bool(append_eos))


class Outputs(NamedTuple):
    """Of one batch."""

    values: Tensor  # [B, n] fp32
    features: Tensor | None  # [B, D] what the last layer read, without gradient


def outputs_of(model: hf.Model, batch: PreferenceBatch, *, features: bool) -> Outputs:
    """The outputs of every text of a right-padded batch.

    Raises:
        ValueError: with `features`, a model whose outputs are no linear map of one position.
    """
    pad = hf.causal_lm(model).config.pad_token_id
    mask = batch.attention_mask
    assert mask is not None
    ids = batch.input_ids.masked_fill(mask == 0, pad)
    with _last_inputs(model) if features else _nothing() as seen:
        values = model(input_ids=ids, attention_mask=mask).logits.float()
    if not features:
        return Outputs(values, None)
    layer, given = seen[-1]
    given = given.detach().float()
    if given.dim() == 3:  # one row per token: the score is read at the last that is no pad token
        place = torch.arange(ids.shape[1], device=ids.device) * (ids != pad)
        given = given[torch.arange(len(ids), device=ids.device), place.argmax(-1)]
    again = nn.functional.linear(
        given, layer.weight.float(), None if layer.bias is None else layer.bias.float()
    )
    if not torch.allclose(again.detach(), values.detach(), atol=1e-2, rtol=1e-2):
        raise ValueError(
            f"the outputs of {type(hf.causal_lm(model)).__name__} are no linear map of the hidden "
            "state of one position, so gradients at its head cannot be formed; use another model."
        )
    return Outputs(values, given)


@contextmanager
def _nothing() -> Iterator[list[Any]]:
    yield []


@contextmanager
def _last_inputs(model: hf.Model) -> Iterator[list[tuple[nn.Linear, Tensor]]]:
    """(layer, what it read) of the linear layers that have as many outputs as the model."""
    count = hf.causal_lm(model).config.num_labels
    seen: list[tuple[nn.Linear, Tensor]] = []

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        seen.append((layer, args[0]))

    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == count]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
