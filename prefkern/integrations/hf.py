"""What is read of a transformers model's modules and config; no forward, and no head, is run here.

Shapes: D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..shard import is_distributed

# A transformers causal model, or a PEFT model around one. nn.Module would be less than the truth:
# the checker would know neither config nor base_model.
Model = Any

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Config names that scale the logits, as transformers' modelling files use them.
_MULTIPLIES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# And those of a tanh soft cap.
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# `logits_scaling` divides (granite, minicpm3, ...), except where the model multiplies by it.
_MULTIPLIES_BY_LOGITS_SCALING = frozenset({"hyperclovax", "hyperclovax_vision_v2"})
# It divides the hidden states there, not the logits.
_DIVIDES_BEFORE_HEAD = frozenset({"minicpm3"})
# Configs that carry a name which their modelling file never applies.
_NOT_APPLIED = {"mpt": frozenset({"logit_scale"})}


def causal_lm(model: Model) -> Model:
    """The transformers model inside a PEFT wrapper (or the model itself)."""
    peft = sys.modules.get("peft")
    return model.get_base_model() if peft and isinstance(model, peft.PeftModel) else model


def text_config(model: Model) -> Any:
    return causal_lm(model).config.get_text_config()


def logit_options(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) that the family applies to what its head returns, read from the text config;
    what it applies to the hidden states before is not among them."""
    skip = _NOT_APPLIED.get(config.model_type, frozenset())
    scale = 1.0
    for name in _MULTIPLIES:
        value = getattr(config, name, None)
        if value is not None and name not in skip:
            scale *= float(value)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None and config.model_type not in _DIVIDES_BEFORE_HEAD:
        multiplies = config.model_type in _MULTIPLIES_BY_LOGITS_SCALING
        scale = scale * float(divisor) if multiplies else scale / float(divisor)
    caps = [getattr(config, name, None) for name in _SOFT_CAPS]
    return scale, next((float(cap) for cap in caps if cap is not None), None)


def output_layer(model: Model) -> Any:
    """The output embedding as PEFT left it; raises ValueError where there is none."""
    base = causal_lm(model)
    layer = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if layer is None:
        raise ValueError(
            f"{type(base).__name__} has no output embedding (lm_head): prefkern needs a causal "
            "language model with a linear head; load it with AutoModelForCausalLM."
        )
    return layer


def module_name(model: Model, module: Any) -> str:
    """What the model calls a module of its own."""
    found = causal_lm(model).named_modules(remove_duplicate=False)
    return next((name for name, other in found if other is module), "lm_head")


def check_linear(model: Model, linear: Any) -> None:
    """Refuses a head whose logits are not hidden @ weight.T + bias of a plain float weight: a
    quantised one, one with a forward of its own."""
    kind = f"{type(linear).__module__}.{type(linear).__name__}"
    weight = getattr(linear, "weight", None)
    if isinstance(weight, Tensor):
        subclass = is_traceable_wrapper_subclass(weight) and not is_distributed(weight)
        if subclass or weight.dtype not in _FLOATS:
            what = f"{type(weight).__name__} of {weight.dtype}" if subclass else str(weight.dtype)
            raise ValueError(
                f"the head {module_name(model, linear)!r} ({kind}) must have a float weight "
                f"[V, D], got {what} {list(weight.shape)}; leave it out of the quantisation."
            )
    if not isinstance(weight, Tensor) or type(linear).forward is not nn.Linear.forward:
        raise ValueError(
            f"the head {module_name(model, linear)!r} must be an nn.Linear, got {kind}, which "
            "computes its logits in its own way; if that is a quantised head, leave it out of the "
            "quantisation."
        )


def refuse_unsupported(model: Model) -> None:
    """Raises ValueError, by name, for what would be ignored silently: quantised heads, prompt
    learning, encoder-decoder models."""
    base, layer = causal_lm(model), output_layer(model)
    name = module_name(model, layer)
    for adapter, settings in getattr(model, "peft_config", {}).items():
        if getattr(settings, "is_prompt_learning", False):
            raise ValueError(
                f"adapter {adapter!r} is prompt learning ({settings.peft_type}), which adds "
                "positions that carry no label; use LoRA or another weight adapter."
            )
        targets = getattr(settings, "target_parameters", None) or ()
        if any(name in target for target in targets):
            raise ValueError(
                f"adapter {adapter!r} targets parameters of the head {name!r}: not supported."
            )
    linear = layer
    while hasattr(linear, "base_layer"):  # PEFT's
        linear = linear.base_layer
    check_linear(model, getattr(linear, "original_module", linear))
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(base).__name__} is an encoder-decoder model; prefkern needs a decoder."
        )


def backbone(model: Model) -> Model:
    """The module below the head, adapters included."""
    base = causal_lm(model)
    inner = base.base_model if base.base_model is not base else base.get_decoder()
    if inner is base:  # Llama 4's text model names another attribute than it has
        inner = getattr(base, "model", base)
    if inner is base:
        raise ValueError(
            f"{type(base).__name__} does not name its backbone (base_model_prefix); prefkern "
            "cannot separate hidden states from the head."
        )
    return inner


def takes_position_ids(model: Model) -> bool:
    """Packed batches restart positions; a backbone without position_ids cannot be packed."""
    return "position_ids" in inspect.signature(backbone(model).forward).parameters


def adapter_off(model: Model) -> AbstractContextManager:
    """Context in which a PEFT model is its base model; a plain model is refused."""
    peft = sys.modules.get("peft")
    if not (peft and isinstance(model, peft.PeftModel)):
        raise ValueError(
            "reference=adapter switches a PEFT adapter off, but the policy has none; set lora_r or "
            "use reference=model."
        )
    return model.disable_adapter()
