"""A value head on the policy: hidden -> 1 on its last states, trained beside it (OREO, RTO).

Shapes: [B, T] as the batch has it, N all its rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ... import losses
from ...integrations import hf
from ...losses.record import Loss
from ..config import TrainConfig
from ..data import PreferenceBatch
from ..forward import inputs_of
from ..models import autocast
from ..providers import Micro, Provider

NAME = "value_head"  # of the module in the step, and of its file beside the model
FILE = f"{NAME}.safetensors"
# What a critic is trained towards, beside its prediction.
TARGETS = ("old_values", "returns")


class ValueHead(nn.Linear):
    """V = w . h + b in fp32 whatever the model's type; 0 at its start."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, dtype=torch.float32)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:  # [..., D] -> [...]
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float()).squeeze(-1)


class ValueHeads(Provider):
    """`value`, or `value_pred` where columns give a critic's targets, with gradient."""

    def __init__(self, config: TrainConfig, records: Sequence[Loss]) -> None:
        super().__init__(config, records)
        self.tensors = wanted_tensors(config, records)

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return bool(wanted_tensors(config, records))

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset(wanted_tensors(self.config, [record]))

    def check(self) -> None:
        if "value_pred" in self.tensors:
            lacking = [name for name in TARGETS if name not in self.config.columns]
            if lacking:
                raise ValueError(
                    f"loss {', '.join(self.config.loss)} trains a critic on old_values and "
                    f"returns; {' and '.join(lacking)} is read from no column: --column "
                    f"{lacking[0]}=NAME."
                )

    def on_policy(self, policy: hf.Model, resume: Path | None, processes: int) -> None:
        self.head = build_head(self.config.model, policy)

    def modules(self) -> dict[str, nn.Module]:
        return {NAME: self.head}

    def parameter_group(self, name: str) -> tuple[str, dict[str, Any]] | None:
        if not name.startswith(f"{NAME}."):
            return None
        rate = self.config.value_learning_rate
        rate = self.config.learning_rate if rate is None else rate
        return NAME, {"weight_decay": 0.0, "lr": rate}

    def from_states(self, micro: Micro, hidden: Tensor) -> dict[str, Any]:
        value = self.head(hidden if self.config.value_gradient else hidden.detach()).flatten()
        scored = (micro.batch.targets != -100).flatten()
        self.mean = value.detach()[scored].mean()
        return dict.fromkeys(self.tensors, value)

    def metrics(self) -> dict[str, Tensor]:
        return {"value/mean": self.mean}


def wanted_tensors(config: TrainConfig, records: Sequence[Loss]) -> list[str]:
    """The arguments of the losses that are a value head's: what is required and in no column, and
    the prediction of a critic whose targets are in columns."""
    found = set()
    for record in records:
        if "value" in losses.required(record) and "value" not in config.columns:
            found.add("value")
        critic = any(name in config.columns for name in TARGETS)
        if "value_pred" in losses.arguments(record) and critic:
            found.add("value_pred")
    return sorted(found)


def build_head(folder: str, policy: hf.Model) -> ValueHead:
    """A head that fits the policy, with the weights that lie beside a trained model."""
    head = ValueHead(hf.text_config(policy).hidden_size)
    stored = Path(folder) / FILE
    if stored.is_file():
        head.load_state_dict(load_file(stored))
    return head


@torch.no_grad()
def token_values(
    head: ValueHead, model: hf.Model, batch: PreferenceBatch, config: TrainConfig
) -> Tensor:  # [B, T]
    """V at the state that predicts each target, under a model that was given `at_head`."""
    device = batch.input_ids.device.type
    with autocast(config, device), inputs_of(model, batch) as inputs:
        return model(**inputs, at_head=lambda view: head(view.hidden)).value
