"""Options that were given and that nothing in a run reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import AdapterOptions, TrainConfig
from ..demands import ReferenceNeeds
from ..providers import Provider
from .masks import Masks
from .options import MaskOptions, OnlineOptions, RoundOptions, SyncOptions, ValueOptions
from .sync import ReferenceSync
from .value_head import ValueHeads

# Which provider reads a group of options, and what makes a run have it.
_OF_PROVIDERS: dict[type[Provider], tuple[type[Any], str]] = {
    Masks: (MaskOptions, "a loss with a mask module"),
    ValueHeads: (ValueOptions, "a loss with a value head"),
    ReferenceSync: (SyncOptions, "sync_ref_model"),
}
_OF_EVALUATION = ("eval_split", "eval_limit", "eval_steps", "per_device_eval_batch_size")


def idle_options(config: TrainConfig, providers: Sequence[Provider]) -> list[str]:
    """A line for every option that differs from its default and does nothing, with what it needs.

    Only of a run of training: evaluation and the like have the options of training in common.
    """
    return [
        f"{name} is given, and nothing reads it without {needed}"
        for name, needed in _idle(config, providers)
        if getattr(config, name) != getattr(TrainConfig, name, None)
    ]


def _idle(config: TrainConfig, providers: Sequence[Provider]) -> Iterator[tuple[str, str]]:
    for kind, (group, needed) in _OF_PROVIDERS.items():
        if not any(isinstance(provider, kind) for provider in providers):
            yield from _names(group, needed)
    if not config.lora_r and config.slow_learning_rate is None:
        yield from _names(AdapterOptions, "lora_r")
    if config.round_data != "online":
        own = {option.name for option in dataclasses.fields(RoundOptions)}
        pairs = _names(OnlineOptions, "round_data=online")
        yield from (pair for pair in pairs if pair[0] not in own)
    if config.eval_dataset is None:
        yield from ((name, "eval_dataset") for name in _OF_EVALUATION)
    for option, split in (("dataset", "dataset_split"), ("eval_dataset", "eval_split")):
        source = Path(getattr(config, option) or "no data set")
        if source.is_file() or (source / "state.json").is_file():  # of one saved Dataset
            yield split, f"splits, which {option} {source} has none of"
    if not config.save_steps:
        yield "save_total_limit", "save_steps"
    if config.max_steps > 0:
        yield "num_train_epochs", "max_steps below 1, which overrides it"
    moves = any(provider.moves_reference for provider in providers)
    wanted = any(provider.wants_reference for provider in providers)
    if not (ReferenceNeeds.of(config).any or moves or wanted or config.generation_mixture):
        yield "ref_model", "a loss that compares with a reference"


def _names(group: type[Any], needed: str) -> Iterator[tuple[str, str]]:
    yield from ((option.name, needed) for option in dataclasses.fields(group))
