"""Preference data: reading, checking, tokenising, planning batches and collating them."""

from .batches import IGNORE, collate, plan_batches, plan_in_order
from .load import fingerprint, length_baseline, load_examples
from .records import (
    LAYOUTS,
    Example,
    Loaded,
    PreferenceBatch,
    Sequence,
    SkipReport,
)

__all__ = [
    "IGNORE",
    "LAYOUTS",
    "Example",
    "Loaded",
    "PreferenceBatch",
    "Sequence",
    "SkipReport",
    "collate",
    "fingerprint",
    "length_baseline",
    "load_examples",
    "plan_batches",
    "plan_in_order",
]
