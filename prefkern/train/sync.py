"""A reference that moves: synchronised while a run trains, extrapolated between two rounds.

theta is the policy's parameters, theta_ref the reference's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from ..integrations import hf

FILE = "reference.safetensors"


class ReferenceSync:
    """theta_ref <- (1 - alpha) theta_ref + alpha theta after every `every`-th optimizer step.

    TR-DPO (arXiv 2404.09656): alpha = 1 is its hard update, a smaller one its soft update. A policy
    with a LoRA adapter counts with its adapter added to the weights, base + s B A; the reference
    then is a model of its own.

    Args:
        policy: The trained model.
        reference: Frozen model of the same architecture, changed in place.
        alpha: In (0, 1].
        every: >= 1.

    Raises:
        ValueError: numbers out of range; a reference with an adapter of its own; parameters that
            do not match the policy's.
    """

    def __init__(self, policy: hf.Model, reference: hf.Model, *, alpha: float, every: int) -> None:
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {alpha}.")
        if every < 1:
            raise ValueError(f"ref_model_sync_steps must be at least 1, got {every}.")
        if hasattr(reference, "peft_config"):
            raise ValueError(
                "sync_ref_model moves the reference's own weights, but the reference is an adapter "
                "on a base model; merge it first (merge_and_unload) and pass that as ref_model."
            )
        own, other = (shapes(effective_parameters(model)) for model in (policy, reference))
        if own != other:
            lacking = sorted(
                name for name in own.keys() | other.keys() if own.get(name) != other.get(name)
            )
            raise ValueError(
                "sync_ref_model needs a reference of the policy's architecture; different or "
                f"absent in one of them: {', '.join(lacking[:3])} ({len(lacking)} in all)."
            )
        self.policy, self.reference, self.alpha, self.every = policy, reference, alpha, every

    def after_step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """To be called after the optimizer's `step`-th step (from 1)."""
        if step % self.every == 0:
            soft_update(self.reference, self.policy, self.alpha)

    def save(self, folder: Path) -> None:
        """Beside the other parts of a checkpoint: the reference is no longer the model it was."""
        save_model(self.reference, str(folder / FILE))

    def load(self, folder: Path) -> None:
        device = next(self.reference.parameters()).device
        load_model(self.reference, folder / FILE, device=str(device))


@torch.no_grad()
def soft_update(reference: hf.Model, policy: hf.Model, alpha: float) -> None:
    """theta_ref <- (1 - alpha) theta_ref + alpha theta, in place; computed in fp32.

    alpha = 1 copies the policy bit for bit.
    """
    source = effective_parameters(policy)
    for name, target in reference.named_parameters():
        value = source[name]
        if alpha < 1.0:
            value = torch.lerp(target.float(), value.float(), alpha)
        target.copy_(value)


@torch.no_grad()
def extrapolate(policy: hf.Model, before: hf.Model, alpha: float) -> None:
    """theta <- theta + alpha (theta - theta_before), in place; computed in fp32.

    The step between two rounds of Accelerated PO (arXiv 2410.06293): theta is what the round ended
    with, theta_before what the round before it ended with. alpha is about 0.3; 0 changes nothing.

    Raises:
        ValueError: alpha < 0, a LoRA adapter, models of different architecture.
    """
    if alpha < 0.0:
        raise ValueError(f"round_extrapolation must be at least 0, got {alpha}.")
    for model in (policy, before):
        if hasattr(model, "peft_config"):
            raise ValueError(
                "parameters cannot be extrapolated through a LoRA adapter: its change of a weight "
                "is the product of two matrices, and a line through the matrices is none through "
                "their product; set lora_r=0, or merge the adapters first."
            )
    own, other = dict(policy.named_parameters()), dict(before.named_parameters())
    if shapes(own) != shapes(other):
        raise ValueError("extrapolation needs two models with the same parameters.")
    for name, target in own.items():
        now = target.float()
        target.copy_(now + alpha * (now - other[name].to(now.device).float()))


def effective_parameters(model: hf.Model) -> dict[str, Tensor]:
    """Parameters by their name in the plain model, with the active LoRA adapters added in."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return dict(model.named_parameters())
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: nn.Module = model.get_base_model()
    adapted: dict[str, Any] = {
        name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)
    }
    found: dict[str, Tensor] = {}
    for name, parameter in base.named_parameters():
        owner = next((a for a in adapted if name.startswith(f"{a}.")), None)
        if owner is None:
            found[name] = parameter
        elif (inside := name.removeprefix(f"{owner}.")).startswith("base_layer."):
            plain = inside.removeprefix("base_layer.")
            value = parameter.detach()
            if plain == "weight":
                layer = adapted[owner]
                for adapter in layer.active_adapters:
                    value = value + layer.get_delta_weight(adapter).to(value.dtype)
            found[f"{owner}.{plain}"] = value
    return found


def shapes(parameters: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in parameters.items()}
