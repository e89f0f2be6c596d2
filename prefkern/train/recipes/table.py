"""Every provider there is, and which of them a run has."""

from __future__ import annotations

from collections.abc import Sequence

from ...losses.record import Loss
from ..config import TrainConfig
from ..data_providers import Columns, StepCounts
from ..demands import check_loss_args
from ..providers import Provider, check_supplied, lacking_parts
from .activations import Activations
from .aux_model import AuxModel
from .baseline import Baseline
from .fused_reference import FusedReference
from .idle import idle_options
from .images import Images, vision_of
from .kto_baseline import KtoBaseline
from .masks import Masks
from .online.makers import MAKERS
from .rejected_reference import RejectedReference
from .reward.head import RewardHead
from .reward.ideal_points import IdealPoints
from .reward.sources import Sources
from .states import LossStates
from .steps import StepCosine, StepIndex
from .sync import ReferenceSync
from .two_speeds import TwoSpeeds
from .value_head import ValueHeads

__all__ = ["PROVIDERS", "idle_options", "offers", "providers_of", "vision_of"]

# In the order in which a step calls them.
PROVIDERS: tuple[type[Provider], ...] = (
    StepCounts, KtoBaseline, Activations, AuxModel, FusedReference, Baseline, RejectedReference,
    StepIndex, StepCosine, Masks, ValueHeads, LossStates, TwoSpeeds, ReferenceSync, RewardHead,
    Sources, IdealPoints, Images,
)  # fmt: skip


def providers_of(config: TrainConfig, records: Sequence[Loss]) -> list[Provider]:
    """The providers of a run; every check that needs neither model nor data is done.

    Raises:
        ValueError: a tensor that nothing supplies, options and losses that do not go together.
    """
    found = [kind(config, records) for kind in PROVIDERS if kind.wanted(config, records)]
    check_loss_args(config, records, [name for provider in found for name in provider.takes])
    for provider in found:
        provider.check()
    lacking_parts(records, config, found)
    found.insert(0, Columns(config, records, found, offers()))
    check_supplied(config, records, found)
    return found


def offers() -> dict[str, str]:
    """Tensor -> the option by which a recipe would supply it."""
    made = dict.fromkeys((n for kind in MAKERS for n in kind.makes), "--round-data online")
    own = {name: how for kind in PROVIDERS for name, how in kind.offers.items()}
    return made | own
