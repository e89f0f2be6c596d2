"""Two LoRA adapters on one backbone that learn at two rates, and merging adapters.

After online fast-slow chasing (OFS-DPO, arXiv 2406.05534), of which only a description was read:
the fast adapter trains with `dpo_second_reference`, DPO plus a term that drives its preference gap
beyond the slow adapter's; the slow one trains with plain `dpo`; they change places when the slow
one has the larger gap. Provisional, like the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..integrations import hf
from ..objective import segments
from . import checkpoint as ckpt
from .config import TrainConfig
from .data import PreferenceBatch
from .reference import ReferenceRows
from .step import PreferenceStep

FAST, SLOW = "default", "slow"  # PEFT writes the adapter "default" into the folder itself
FILE = "speeds.json"


def add_slow_adapter(policy: hf.Model, folder: Path, processes: int = 1) -> None:
    """Adds the slow adapter: as `folder` holds it, else a copy of the fast one."""
    if processes > 1:
        raise ValueError(
            f"two speeds train in one process, got {processes}: each would see other pairs and "
            "exchange its adapters at other steps."
        )
    if not hasattr(policy, "peft_config") or list(policy.peft_config) != [FAST]:
        raise ValueError("two speeds need a policy with one LoRA adapter; set lora_r.")
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


class TwoSpeedStep(PreferenceStep):
    """forward: the fast adapter's loss plus the slow one's; their parameters share no gradient."""

    def __init__(self, policy: nn.Module, config: TrainConfig, layout: str, *rest: Any) -> None:
        super().__init__(policy, config, layout, *rest)
        beta = {k: v for k, v in config.loss_args.items() if k == "beta"}
        plain = dataclasses.replace(
            config, loss=("dpo",), loss_args=beta, loss_weights=None, slow_learning_rate=None
        )
        # in a list, so that the policy is not registered twice
        self._slow = [PreferenceStep(policy, plain, layout)]
        # slow minus fast preference gap, summed over the pairs of a step
        self.lead: Tensor | float = 0.0
        self.swaps = 0

    def forward(
        self,
        batch: PreferenceBatch,
        reference: ReferenceRows,
        num_items: dict[str, Any],
        metrics: bool = True,
        real: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        slow = self._slow[0]
        activate(self.policy, SLOW)
        slow_loss, slow_found = slow(batch, reference, num_items, real=real)
        slow_logps = self._sequence_logps(batch)  # [S]
        activate(self.policy, FAST)
        reference = dataclasses.replace(
            reference,
            loss_args=reference.loss_args
            | {"slow_chosen_logps": slow_logps[0::2], "slow_rejected_logps": slow_logps[1::2]},
        )
        loss, found = super().forward(batch, reference, num_items, real=real)
        if self.training:
            gaps = [f["logps/chosen"] - f["logps/rejected"] for f in (slow_found, found)]
            self.lead = self.lead + (gaps[0] - gaps[1]) * (batch.cu_groups.numel() - 1)
        found |= {f"slow/{k}": v for k, v in slow_found.items() if k.startswith("rewards/")}
        found |= {"slow/loss": slow_loss.detach(), "slow/swaps": loss.new_tensor(float(self.swaps))}
        return loss + slow_loss, found if metrics else {}

    @torch.no_grad()
    def _sequence_logps(self, batch: PreferenceBatch) -> Tensor:  # [S] fp64
        device = batch.input_ids.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.config.bf16):
            logp = hf.fused_logps(
                self.policy, batch.input_ids, batch.targets, position_ids=batch.position_ids,
                attention_mask=batch.attention_mask, backend=self.config.backend,
            )  # fmt: skip
        if batch.cu_seqlens is None:
            return logp.double().sum(1)
        return segments.segment_sum(logp.flatten(), batch.cu_seqlens)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Exchanges the adapters where the slow one's gap was larger over the step's pairs."""
        if bool(self.lead > 0.0):
            swap(self.policy, optimizer)
            self.swaps += 1
        self.lead = 0.0

    def save(self, folder: Path) -> None:
        ckpt.write_json(folder / FILE, {"swaps": self.swaps})

    def load(self, folder: Path) -> None:
        self.swaps = ckpt.read_json(folder / FILE)["swaps"]


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


def merge_adapters(
    folders: Sequence[str | Path], output: str | Path, weights: Sequence[float] | None = None
) -> Path:
    """One adapter that changes every weight by sum_i w_i (change by adapter i).

    The linear merge of the adapters of several domains (COFS-DPO). It is exact: the matrices are
    put side by side (PEFT's "cat"), so the rank of the result is the sum of the ranks; a sum of
    the factors themselves would add products of one adapter's A with another's B.

    Args:
        folders: Adapters on the same base model, as runs with lora_r write them.
        output: Folder of the merged adapter, with the first one's tokenizer.
        weights: One number per adapter, default 1 / their count.

    Raises:
        ValueError: fewer than two adapters, weights that do not fit, different base models.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoTokenizer

    from . import models

    paths = [str(folder) for folder in folders]
    if len(paths) < 2:
        raise ValueError(f"merging needs at least two adapters, got {len(paths)}.")
    factors = [1.0 / len(paths)] * len(paths) if weights is None else [float(w) for w in weights]
    if len(factors) != len(paths):
        raise ValueError(f"weights must have one number per adapter ({len(paths)}), got {factors}.")
    for path in paths:
        if not (Path(path) / "adapter_config.json").is_file():
            raise ValueError(f"{path} holds no adapter (no adapter_config.json); merge such only.")
    bases = {PeftConfig.from_pretrained(path).base_model_name_or_path for path in paths}
    if len(bases) > 1:
        raise ValueError(
            f"the adapters belong to different base models: {sorted(map(str, bases))}."
        )
    base = models.load_causal_lm(str(bases.pop()), TrainConfig(model=paths[0], dataset=""))
    names = [f"part{i}" for i in range(len(paths))]
    model = PeftModel.from_pretrained(base, paths[0], adapter_name=names[0])
    for name, path in zip(names[1:], paths[1:], strict=True):
        model.load_adapter(path, adapter_name=name)
    model.add_weighted_adapter(names, factors, adapter_name=FAST, combination_type="cat")
    model.save_pretrained(str(output), selected_adapters=[FAST])
    AutoTokenizer.from_pretrained(paths[0]).save_pretrained(output)
    return Path(output)
