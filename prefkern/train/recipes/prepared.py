"""Which of the two ways prepares a run: a language model's or a reward model's."""

from __future__ import annotations

from ..config import TrainConfig
from ..run import Run, prepare
from .reward.prepare import prepare_reward


def prepared_run(config: TrainConfig, *, training: bool = True) -> Run:
    """Loads and checks everything; raises as `run.prepare`."""
    kind = prepare_reward if config.head == "reward" else prepare
    return kind(config, training=training)
