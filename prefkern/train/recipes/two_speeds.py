"""Two LoRA adapters on one backbone that learn at two rates.

After online fast-slow chasing (OFS-DPO, arXiv 2406.05534), of which only a description was read:
the fast adapter trains with `dpo_second_reference`, DPO plus a term that drives its preference gap
beyond the slow adapter's; the slow one trains with plain `dpo`; they change places when the slow
one has the larger gap. Provisional, like the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...integrations import hf
from ...losses.record import Loss
from ..config import TrainConfig
from ..providers import Micro, Provider
from ..reference import ReferenceRows, sequence_sums, token_logps
from ..seals import read_json, write_json
from ..step import PreferenceStep

FAST, SLOW = "default", "slow"  # PEFT writes the adapter "default" into the folder itself
FILE = "speeds.json"
LOSS, SLOW_LOSS = "dpo_second_reference", "dpo"
TENSORS = ("slow_chosen_logps", "slow_rejected_logps")


class TwoSpeedStep(PreferenceStep):
    """forward: the fast adapter's loss plus the slow one's; their parameters share no gradient."""

    def __init__(
        self, policy: nn.Module, config: TrainConfig, layout: str, providers: Sequence[Provider]
    ) -> None:
        super().__init__(policy, config, layout, providers)
        self.speeds = next(p for p in providers if isinstance(p, TwoSpeeds))
        beta = {k: v for k, v in config.loss_args.items() if k == "beta"}
        plain = dataclasses.replace(
            config, loss=(SLOW_LOSS,), loss_args=beta, loss_weights=None, slow_learning_rate=None
        )
        # in a list, so that the policy is not registered twice
        self._slow = [PreferenceStep(policy, plain, layout)]

    def forward(
        self,
        micro: Micro,
        reference: ReferenceRows,
        given: Mapping[str, Any],
        num_items: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        slow = self._slow[0]
        activate(self.policy, SLOW)
        slow_loss, slow_found = slow(micro, reference, {}, num_items)
        logps = sequence_sums(token_logps(self.policy, micro.batch, self.config), micro.batch)
        activate(self.policy, FAST)
        behind = dict(zip(TENSORS, (logps[0::2], logps[1::2]), strict=True))
        loss, found = super().forward(micro, reference, {**given, **behind}, num_items)
        if self.training:
            gaps = [f["logps/chosen"] - f["logps/rejected"] for f in (slow_found, found)]
            self.speeds.lead = self.speeds.lead + (gaps[0] - gaps[1]) * len(micro.examples)
        found |= {f"slow/{k}": v for k, v in slow_found.items() if k.startswith("rewards/")}
        found["slow/loss"] = slow_loss.detach()
        found["slow/swaps"] = loss.new_tensor(float(self.speeds.swaps))
        return loss + slow_loss, found


class TwoSpeeds(Provider):
    """The slow adapter: its sequence log-probabilities, and the exchange after a step."""

    offers = dict.fromkeys(TENSORS, "--slow-learning-rate")
    step_class = TwoSpeedStep

    def __init__(self, config: TrainConfig, records: Sequence[Loss]) -> None:
        super().__init__(config, records)
        # slow minus fast preference gap, summed over the pairs of a step
        self.lead: Tensor | float = 0.0
        self.swaps = 0

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return config.slow_learning_rate is not None

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset(TENSORS)

    def check(self) -> None:
        config = self.config
        if not config.lora_r:
            raise ValueError("slow_learning_rate trains a second LoRA adapter; set lora_r.")
        if config.loss != (LOSS,):
            raise ValueError(
                f"slow_learning_rate needs loss {LOSS} (the slow adapter itself trains "
                f"with {SLOW_LOSS}), got {list(config.loss)}."
            )
        if config.gradient_checkpointing:
            raise ValueError(
                "slow_learning_rate cannot go with gradient_checkpointing: activations would be "
                "recomputed under the other adapter."
            )
        if config.sync_ref_model:
            raise ValueError(
                "slow_learning_rate cannot go with sync_ref_model: two moving references."
            )

    def on_policy(self, policy: hf.Model, resume: Path | None, processes: int) -> None:
        self.policy = policy
        add_slow_adapter(policy, resume or Path(self.config.model), processes)

    def parameter_group(self, name: str) -> tuple[str, dict[str, Any]] | None:
        if f".{SLOW}." not in name:
            return None
        rate, decay = self.config.slow_learning_rate, self.config.weight_decay
        return SLOW, {"weight_decay": decay, "lr": rate}

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Exchanges the adapters where the slow one's gap was larger over the step's pairs."""
        if bool(self.lead > 0.0):
            swap(self.policy, optimizer)
            self.swaps += 1
        self.lead = 0.0

    def save(self, folder: Path) -> None:
        write_json(folder / FILE, {"swaps": self.swaps})

    def load(self, folder: Path) -> None:
        self.swaps = read_json(folder / FILE)["swaps"]


def add_slow_adapter(policy: hf.Model, folder: Path, processes: int = 1) -> None:
    """Adds the slow adapter: as `folder` holds it, else a copy of the fast one."""
    if processes > 1:
        raise ValueError(
            f"two speeds train in one process, got {processes}: each would see other pairs and "
            "exchange its adapters at other steps."
        )
    if not hasattr(policy, "peft_config") or list(policy.peft_config) != [FAST]:
        raise ValueError("two speeds need a policy with one LoRA adapter; set lora_r.")
    if policy.peft_config[FAST].modules_to_save:
        raise ValueError(
            "two speeds exchange LoRA matrices, and the adapter also trains whole modules "
            f"({', '.join(policy.peft_config[FAST].modules_to_save)}); use one without "
            "modules_to_save."
        )
    from peft import set_peft_model_state_dict

    policy.add_adapter(SLOW, dataclasses.replace(policy.peft_config[FAST]))
    stored = folder / SLOW / "adapter_model.safetensors"
    if stored.is_file():
        set_peft_model_state_dict(policy, load_file(stored), adapter_name=SLOW)
    else:
        with torch.no_grad():
            for fast, slow in adapter_pairs(policy):
                slow.copy_(fast)
    activate(policy, FAST)


def adapter_pairs(policy: hf.Model) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """(fast, slow) parameter of every adapted matrix."""
    own = dict(policy.named_parameters())
    return [
        (parameter, own[name.replace(f".{FAST}.", f".{SLOW}.")])
        for name, parameter in own.items()
        if f".{FAST}." in name and "lora_" in name
    ]


def activate(policy: hf.Model, name: str) -> None:
    """Makes one adapter the active one; both keep their gradients (PEFT would freeze the other)."""
    policy.set_adapter(name)
    for pair in adapter_pairs(policy):
        for parameter in pair:
            parameter.requires_grad_(True)


@torch.no_grad()
def swap(policy: hf.Model, optimizer: torch.optim.Optimizer) -> None:
    """Exchanges the two adapters' weights and the optimizer's moments that belong to them."""
    for fast, slow in adapter_pairs(policy):
        held = fast.clone()
        fast.copy_(slow)
        slow.copy_(held)
        states = optimizer.state
        if fast in states and slow in states:
            states[fast], states[slow] = states[slow], states[fast]
