"""Preference data: reading, checking, tokenising, planning batches and collating them."""

from .batches import IGNORE, collate, plan_batches, plan_in_order
from .load import Loader, data_hash, length_baseline, load_examples
from .records import (
    LAYOUTS,
    Encoded,
    Example,
    Loaded,
    PreferenceBatch,
    SkipReport,
)

__all__ = [
    "IGNORE",
    "LAYOUTS",
    "Encoded",
    "Example",
    "Loaded",
    "Loader",
    "PreferenceBatch",
    "SkipReport",
    "collate",
    "data_hash",
    "length_baseline",
    "load_examples",
    "plan_batches",
    "plan_in_order",
]
