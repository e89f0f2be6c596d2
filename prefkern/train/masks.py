"""SparsePO's learned masks in a run: built for the reference model, drawn alive, spread and logged.

Shapes: L layers, D hidden size, n scored rows of a batch, N all its rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..integrations import hf
from ..losses.weights import SparseMasks
from .config import TrainConfig

# Loss arguments that configure the mask module. The first two are unknown to the loss itself.
OPTIONS = ("mask_on_reward", "mask_on_kl", "rw_kl_independent")
FILE = "masks.safetensors"
_EPS_NAMES = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
# A mask that lets through less than this share of the tokens at its start counts as dead.
_ALIVE = 0.1
_DRAWS = 100


def build(config: TrainConfig, reference: nn.Module) -> SparseMasks:
    """Masks that fit the reference's layers; in fp32 whatever the model's type."""
    torch.manual_seed(config.seed)  # whatever loading drew, the masks start the same
    settings = hf.text_config(reference)
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


def arguments(masks: SparseMasks, layers: Tensor, scored: Tensor) -> dict[str, Any]:
    """The loss arguments: masks of the scored rows [n] spread over all rows [N], 0 elsewhere."""
    return {
        name: value.new_zeros(scored.shape).masked_scatter(scored, value)
        if isinstance(value, Tensor)
        else value
        for name, value in masks(layers).items()
    }


def metrics(arguments: dict[str, Any], scored: Tensor) -> dict[str, Tensor]:
    """Mean of each mask over the scored rows and the share of rows it drops."""
    found = {}
    for name, short in (("reward_mask", "reward"), ("kl_mask", "kl")):
        value = arguments.get(name)
        if value is not None:
            rows = value.detach()[scored]
            found[f"masks/{short}_mean"] = rows.double().mean()
            found[f"masks/{short}_zeros"] = (rows == 0).double().mean()
    return found
