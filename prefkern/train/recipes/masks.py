"""SparsePO's learned masks in a run: built for the reference model, drawn alive, spread and logged.

Shapes: L layers, D hidden size, n scored rows of a batch, N all its rows.
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
from ...losses.weights import SparseMasks
from .. import models
from ..config import TrainConfig
from ..data import PreferenceBatch, collate
from ..providers import Micro, Opened, Provider
from ..reference import ReferenceRows
from ..sharded import fill_module

# Loss arguments that configure the mask module. The first two are unknown to the loss itself.
OPTIONS = ("mask_on_reward", "mask_on_kl", "rw_kl_independent")
NAME = "masks"  # of the module in the step, and of its file beside the model
FILE = f"{NAME}.safetensors"
_EPS_NAMES = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
# A mask that lets through less than this share of the tokens at its start counts as dead.
_ALIVE = 0.1
_DRAWS = 100


class Masks(Provider):
    """`reward_mask` and `kl_mask` from a module that is trained beside the policy."""

    wants_reference = "the reference's hidden states"
    wants_layers = True

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return any("reward_mask" in losses.required(record) for record in records)

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset({"reward_mask", "kl_mask"})

    @property
    def takes(self) -> frozenset[str]:
        return frozenset(OPTIONS)

    def on_policy(self, policy: hf.Model, resume: Path | None, processes: int) -> None:
        name = self.config.ref_model
        self.settings = hf.text_config(policy) if name is None else models.read_settings(name)
        self.masks = build(self.config, self.settings)

    def open(self, opened: Opened) -> None:
        if not opened.training or opened.resume is not None:
            return
        first = opened.examples[: self.config.per_device_train_batch_size]
        batch = collate(first, packed=opened.packed, pad_id=opened.pad_id).to(opened.device)
        states = opened.reference.rows(batch).states
        assert states is not None and states.layers is not None
        # drawn on a copy, since those of the run may be sharded by now
        drawn = build(self.config, self.settings).to(opened.device)
        if draws := redraw_dead(drawn, states.layers[:, batch.targets != -100]):
            fill_module(self.masks, drawn.state_dict())
            opened.say(
                f"sparsepo: masks that were 0 on nearly every token, drawn again {draws} time(s)."
            )

    def modules(self) -> dict[str, nn.Module]:
        return {NAME: self.masks}

    def parameter_group(self, name: str) -> tuple[str, dict[str, Any]] | None:
        if not name.startswith(f"{NAME}."):
            return None
        rate = self.config.mask_learning_rate
        return NAME, {
            "weight_decay": self.config.mask_weight_decay,
            "lr": self.config.learning_rate if rate is None else rate,
        }

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        # read where the masks run, inside the wrapped forward
        states = reference.states
        assert states is not None and states.layers is not None
        self.layers = states.layers[:, micro.batch.targets != -100]
        return {}

    def learned(self, batch: PreferenceBatch) -> dict[str, Any]:
        found, scored = self.masks(self.layers), (batch.targets != -100).flatten()
        self.last = {k: v.detach() for k, v in found.items() if isinstance(v, Tensor)}
        return {name: at_scored(value, scored) for name, value in found.items()}

    def metrics(self) -> dict[str, Tensor]:
        """Mean of each mask over the scored rows and the share of rows it drops."""
        found = {}
        for name, rows in self.last.items():
            short = name.removesuffix("_mask")
            found[f"{NAME}/{short}_mean"] = rows.double().mean()
            found[f"{NAME}/{short}_zeros"] = (rows == 0).double().mean()
        return found


def at_scored(value: Any, scored: Tensor) -> Any:
    """A mask of the scored rows [n] over all rows [N], 0 elsewhere; a flag as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.new_zeros(scored.shape).masked_scatter(scored, value)


def build(config: TrainConfig, settings: Any) -> SparseMasks:
    """Masks that fit the layers of a reference with these settings; in fp32 whatever its type."""
    torch.manual_seed(config.seed)  # whatever loading drew, the masks start the same
    eps = next((getattr(settings, name) for name in _EPS_NAMES if hasattr(settings, name)), 1e-5)
    masks = SparseMasks(
        settings.num_hidden_layers,
        settings.hidden_size,
        layer_norm_eps=eps,
        dtype=torch.float32,
        **{name: value for name, value in config.loss_args.items() if name in OPTIONS},
    )
    stored = Path(config.model) / FILE
    if stored.is_file():
        masks.load_state_dict(load_file(stored))
    return masks


@torch.no_grad()
def redraw_dead(masks: SparseMasks, layers: Tensor) -> int:
    """Draws masks again that are 0 on nearly all scored rows `layers` [L, n, D]; returns how often.

    Two ReLUs in a row: with few layers a third of the draws are 0 everywhere, and then neither
    policy nor mask ever receives a gradient.
    """
    draws = 0
    for mask in (masks.reward_mask, masks.kl_mask):
        while mask is not None and (mask(layers) > 0).double().mean() < _ALIVE:
            mask.reset_parameters()
            draws += 1
            if draws == _DRAWS:
                raise ValueError(
                    f"sparsepo's masks were 0 on nearly every token of the first batch in {_DRAWS} "
                    "draws; use another seed, or a reference whose hidden states are not constant."
                )
    return draws
