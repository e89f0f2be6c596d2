"""Preference training of diffusion and flow models: schedules, noisy inputs, the module that a loop
trains, and sampling. Losses over prediction errors are in `prefkern.losses`."""

from .batches import Pairs, Ranked, Single
from .cond import dropped
from .guidance import Guided, mixed_weights
from .inversion import invert
from .labels import win_probability, win_share
from .noised import Inverted, Noised
from .own import as_step, branches, own_noised, step_pairs, truncated
from .preference import DiffusionOutput, DiffusionPreference
from .schedule import CLEAN, Schedule, Step
from .walk import Denoiser, Transition, ladder, noised_twins, sample, walk

__all__ = [
    "CLEAN",
    "Denoiser",
    "DiffusionOutput",
    "DiffusionPreference",
    "Guided",
    "Inverted",
    "Noised",
    "Pairs",
    "Ranked",
    "Schedule",
    "Single",
    "Step",
    "Transition",
    "as_step",
    "branches",
    "dropped",
    "invert",
    "ladder",
    "mixed_weights",
    "noised_twins",
    "own_noised",
    "sample",
    "step_pairs",
    "truncated",
    "walk",
    "win_probability",
    "win_share",
]
