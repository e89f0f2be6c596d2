"""TRL's trainers on prefkern: change the import, keep the script.

    from prefkern.integrations.trl import DPOConfig, DPOTrainer       # instead of trl's

TRL's own loss types keep TRL's formulas, on prefkern's statistics; every pairwise, pointwise and
listwise loss of prefkern is a `loss_type` beside them. A class of your own takes the mixin before
its TRL trainer: `class Mine(PreferenceLosses, TheirTrainer)`, or `FusedHead` for any trainer.
"""

import trl

from .versions import check_signatures, check_version

check_version(trl.__version__)
check_signatures()

from trl import GRPOConfig, RLOOConfig, SFTConfig  # noqa: E402

from .trainers import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    FusedHead,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    PreferenceLosses,
    RLOOTrainer,
    SFTTrainer,
)

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "FusedHead",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "PreferenceLosses",
    "RLOOConfig",
    "RLOOTrainer",
    "SFTConfig",
    "SFTTrainer",
]
