"""What a run learns or remembers beside the policy: SparsePO's masks, states of losses.

Masks are a submodule of the policy, so the optimizer, DDP and a resumed run see them; they are
saved in a file of their own, so a saved model loads as ever. States move on once per micro-batch
and stand beside the model as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...losses.record import Loss
from ...stats import SeqStats
from ...train.recipes import masks as recipe
from ...train.recipes.states import FILE as STATES_FILE
from ...train.recipes.states import LossStates
from .. import hf
from .plan import LossPlan

NAME = "prefkern_masks"  # of the masks among the policy's modules


class LossMemory:
    """Masks and states of one trainer; what has neither has no memory."""

    def __init__(self, trainer: Any, plan: LossPlan) -> None:
        self.trainer = trainer
        self.masks: Any = None
        self._found: dict[str, Tensor] = {}  # masks of the last rows
        config: Any = SimpleNamespace(
            loss_args=plan.loss_args, columns=plan.columns, seed=trainer.args.seed
        )
        self.states = LossStates(config, plan.records)
        if plan.needs.masks:
            self._build(plan)

    @classmethod
    def of(cls, trainer: Any, plan: LossPlan) -> LossMemory | None:
        """None where no loss of the run has masks or a state."""
        stateful = any(record.update is not None for record in plan.records)
        return cls(trainer, plan) if plan.needs.masks or stateful else None

    def _build(self, plan: LossPlan) -> None:
        trainer = self.trainer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                f"loss {', '.join(plan.names)} trains masks beside the policy, which FSDP and "
                "DeepSpeed would shard; train it under DDP or on one device."
            )
        policy = trainer.accelerator.unwrap_model(trainer.model)
        start: Any = SimpleNamespace(
            seed=trainer.args.seed, model=str(policy.config._name_or_path),
            loss_args=plan.mask_options,
        )  # fmt: skip
        reference = trainer.ref_model if trainer.ref_model is not None else policy
        settings = hf.text_config(trainer.accelerator.unwrap_model(reference))
        masks = recipe.build(start, settings)
        self.masks = masks.to(trainer.accelerator.device)
        setattr(policy, NAME, self.masks)
        # every rank looks at the same first rows, so the draws are the same
        rows = list(islice(iter(trainer.train_dataset), trainer.args.per_device_train_batch_size))
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        arguments, targets = trainer._split(inputs)
        found = trainer._read_reference(arguments, targets)
        recipe.redraw_dead(self.masks, found.layers[:, targets != -100])

    # ---- in a step -------------------------------------------------------------------------------

    def arguments(self, training: bool) -> dict[str, Any]:
        """Arguments of `loss_at_head`."""
        state = self.trainer.state
        self.states.progress = state.global_step / max(state.max_steps, 1)

        # TRL's batches name no annotators, and none of them is a filler
        micro: Any = SimpleNamespace(batch=SimpleNamespace(columns={}), real=True)

        def ask(record: Loss, rows: list[SeqStats], hyper: Mapping[str, Any]) -> dict[str, Any]:
            return self.states.from_statistics(record, rows, hyper, micro, training)

        given: dict[str, Any] = {"state_arguments": ask}
        return given if self.masks is None else given | {"masks": self._mask}

    @property
    def _mask(self) -> Callable[[Tensor, Tensor], dict[str, Any]]:
        def masked(layers: Tensor, scored: Tensor) -> dict[str, Any]:
            rows = layers.flatten(1, 2)[:, scored]  # [L, n, D]
            found = self.masks(rows)
            self._found = {k: v.detach() for k, v in found.items() if isinstance(v, Tensor)}
            return {name: recipe.at_scored(value, scored) for name, value in found.items()}

        return masked

    def metrics(self) -> dict[str, Tensor]:
        found = self.states.metrics()
        for name, rows in self._found.items():
            short = name.removesuffix("_mask")
            found[f"masks/{short}_mean"] = rows.double().mean()
            found[f"masks/{short}_zeros"] = (rows == 0).double().mean()
        return found

    # ---- between steps ---------------------------------------------------------------------------

    def add_group(self, optimizer: torch.optim.Optimizer, rate: float | None) -> None:
        """Gives the masks a learning rate of their own."""
        if self.masks is None or rate is None:
            return
        own = {id(p) for p in self.masks.parameters()}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        optimizer.add_param_group({"params": list(self.masks.parameters()), "lr": rate})

    def save(self, folder: Path) -> None:
        if self.masks is not None:
            save_file(self.masks.state_dict(), str(folder / recipe.FILE))
        if self.states.values:
            (folder / STATES_FILE).write_text(json.dumps(self.states.state()["losses"]))

    def load(self, folder: Path) -> None:
        if self.masks is not None and (folder / recipe.FILE).is_file():
            self.masks.load_state_dict(load_file(str(folder / recipe.FILE)))
        if self.states.values and (folder / STATES_FILE).is_file():
            saved = json.loads((folder / STATES_FILE).read_text())
            self.states.restore({"losses": saved})

    @staticmethod
    def without_masks(state: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict as a model without masks would have it."""
        return {name: value for name, value in state.items() if f"{NAME}." not in name}
