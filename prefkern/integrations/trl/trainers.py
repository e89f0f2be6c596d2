"""The trainers and their configurations, under TRL's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import trl

from .fused_head import FusedHead as FusedHead
from .plan import KTO_TYPES
from .preference import PreferenceLosses as PreferenceLosses

_ARGS = 'Arguments of prefkern\'s loss as JSON, for example {"alpha": 0.5}.'
_COLUMNS = (
    'Argument of a loss -> column of the data set, as JSON; "item_weights" multiplies the loss of '
    "a row."
)


@dataclass
class _Losses:
    """Fields of a configuration whose loss_type may name prefkern's losses."""

    loss_args: dict[str, Any] | str | None = field(default=None, metadata={"help": _ARGS})
    loss_columns: dict[str, Any] | str | None = field(default=None, metadata={"help": _COLUMNS})
    mask_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of SparsePO's masks. Default: the policy's."},
    )


@dataclass
class DPOConfig(_Losses, trl.DPOConfig):
    """TRL's, with prefkern's losses.

    Args:
        loss_type: TRL's types, or names of `prefkern.LOSSES`, each with arguments of its own behind
            it if you like ("tdpo2:alpha=0.5"). TRL's types keep TRL's formulas; beside a loss of
            prefkern, or with `loss_args`, they run prefkern's of the same name.
        loss_args: Arguments for all losses that have them. A loss's own defaults hold, for beta and
            label_smoothing too, unless they stand here or were changed from TRL's default.
        loss_columns: Argument -> column of the data set, for what a row brings along. Arguments
            that a loss cannot do without are read from the column of their name.
            "item_weights": a column that multiplies the loss of its row.
        mask_learning_rate: Learning rate of SparsePO's masks. Default: the policy's.
        padding_free: Done here: padding is taken out before the backbone.
        The rest: TRL's.
    """

    _VALID_DICT_FIELDS: ClassVar = [*trl.DPOConfig._VALID_DICT_FIELDS, "loss_args", "loss_columns"]  # type: ignore[misc, unused-ignore]


@dataclass
class KTOConfig(_Losses, trl.KTOConfig):
    """TRL's, with prefkern's losses of single answers as `loss_type`; the fields of `DPOConfig`."""

    _VALID_DICT_FIELDS: ClassVar = [*trl.KTOConfig._VALID_DICT_FIELDS, "loss_args", "loss_columns"]  # type: ignore[misc, unused-ignore]


class DPOTrainer(PreferenceLosses, trl.DPOTrainer):
    """TRL's DPOTrainer: pairs, groups of three answers and ranked lists, every loss of prefkern.

    Args:
        model, ref_model, args, ...: TRL's.
        aux_model: The third, frozen model that some losses read (tgdpo's guide, adpa's aligned
            model). Default None.
        memory_budget: Bytes of logits kept for the backward. Default: a constant of the device.
        backend: Of prefkern's ops. Default "auto".

    Data: TRL's pairs; for ranked lists the columns prompt, completions (a list) and scores (a
    number per answer, higher is better); for losses of three answers a column of the third.
    """


class KTOTrainer(PreferenceLosses, trl.KTOTrainer):
    """TRL's KTOTrainer, with prefkern's losses of single answers."""

    families = ("pointwise",)
    trl_types = KTO_TYPES
    rows = "answers"
    packs = False


class SFTTrainer(FusedHead, trl.SFTTrainer):
    """TRL's SFTTrainer."""


class GRPOTrainer(FusedHead, trl.GRPOTrainer):
    """TRL's GRPOTrainer."""


class RLOOTrainer(FusedHead, trl.RLOOTrainer):
    """TRL's RLOOTrainer."""
