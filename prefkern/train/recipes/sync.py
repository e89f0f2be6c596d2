"""A reference that moves: synchronised while a run trains, extrapolated between two rounds.

theta is the policy's parameters, theta_ref the reference's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from ...integrations import hf
from ...losses.record import Loss
from ..config import TrainConfig
from ..demands import ReferenceNeeds
from ..providers import Opened, Provider
from ..sharded import is_sharded, reshard

FILE = "reference.safetensors"


class ReferenceSync(Provider):
    """theta_ref <- (1 - alpha) theta_ref + alpha theta after every `every`-th optimizer step.

    TR-DPO (arXiv 2404.09656): alpha = ref_model_mixup_alpha = 1 is its hard update, a smaller one
    its soft update; every = ref_model_sync_steps. A policy with a LoRA adapter counts with its
    adapter added to the weights, base + s B A; the reference then is a model of its own.
    """

    moves_reference = True

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return config.sync_ref_model

    def check(self) -> None:
        config = self.config
        if config.precomputed_ref or config.reference == "columns":
            what = "precomputed_ref holds" if config.precomputed_ref else "the columns hold"
            raise ValueError(
                f"sync_ref_model moves the reference while training, but {what} the numbers of one "
                "that stands still; drop one of the two (reference=model computes it as it moves)."
            )
        if config.reference in ("adapter", "none"):
            raise ValueError(
                "sync_ref_model needs a reference with weights of its own, and reference="
                f"{config.reference} has none (the adapter switched off is the base model, which "
                "must not change); set reference=model, which keeps a second model in memory."
            )
        if not ReferenceNeeds.of(config).any:
            raise ValueError(
                f"sync_ref_model moves a reference, but loss {list(config.loss)} has none."
            )

    def open(self, opened: Opened) -> None:
        self.policy, self.reference = opened.policy, opened.reference.model
        check_movable(self.policy, self.reference)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if step % self.config.ref_model_sync_steps == 0:
            for model in (self.reference, self.policy):
                reshard(model)
            soft_update(self.reference, self.policy, self.config.ref_model_mixup_alpha)

    def moved(self) -> dict[str, nn.Module]:
        return {"reference": self.reference}

    def save(self, folder: Path) -> None:
        """The reference is no longer the model it was."""
        if not is_sharded(self.reference):
            save_model(self.reference, str(folder / FILE))

    def load(self, folder: Path) -> None:
        if not (folder / FILE).is_file():
            return  # in parts, and read with those of the policy
        if is_sharded(self.reference):
            raise ValueError(
                f"{folder} holds a moved reference as one file, and this run is sharded; continue "
                "it unsharded."
            )
        device = next(self.reference.parameters()).device
        load_model(self.reference, folder / FILE, device=str(device))


def check_movable(policy: hf.Model, reference: hf.Model) -> None:
    """Refuses a reference with an adapter of its own, and one of another architecture."""
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
    """Parameters by their name in the plain model, with the active LoRA adapters added in.

    Raises:
        ValueError: an adapter on one of two layers that share their weight: the plain model has no
            place for it.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return dict(model.named_parameters())
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: nn.Module = model.get_base_model()
    adapted: dict[str, Any] = {
        name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)
    }
    _refuse_shared(base, adapted)
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


def _refuse_shared(base: nn.Module, adapted: dict[str, Any]) -> None:
    every = list(base.named_parameters(remove_duplicate=False))
    own = {f"{name}.base_layer.weight" for name in adapted}
    weights = {id(parameter): name for name, parameter in every if name in own}
    for name, parameter in every:
        if (other := weights.get(id(parameter), name)) != name:
            raise ValueError(
                f"{other.removesuffix('.base_layer.weight')} has an adapter and shares its weight "
                f"with {name} (tied embeddings), so the sum is no weight of the plain model; leave "
                "it out of lora_target_modules."
            )


def shapes(parameters: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in parameters.items()}
