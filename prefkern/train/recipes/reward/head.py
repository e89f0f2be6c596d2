"""The provider that makes a run one of a reward model: its step, and what such a run refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .... import losses
from ....losses.record import Loss
from ...config import TrainConfig
from ...demands import calls_of, stats_of
from ...providers import Provider
from .step import RewardStep

# Options that mean something to a language model's head, or to a reference, alone.
_OF_LANGUAGE_MODELS = (
    "reference", "ref_model", "precomputed_ref", "aux_model", "precomputed_aux", "fused_ref",
    "precomputed_baseline", "sync_ref_model", "slow_learning_rate", "mask_learning_rate",
    "token_budget", "memory_budget", "tail_mass", "score_prompt", "likelihood_prompt",
)  # fmt: skip
_READS = frozenset({"logp", "length", "ref_logp"})


class RewardHead(Provider):
    """Present with `--head reward`."""

    step_class = RewardStep

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return config.head == "reward"

    def check(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
        for name in _OF_LANGUAGE_MODELS:
            if getattr(self.config, name) != defaults[name]:
                raise ValueError(
                    f"{name} is of language models and goes with no head=reward, whose scores have "
                    "no reference and no tokens; drop it."
                )
        if self.config.packing == "on":
            raise ValueError("head=reward reads one score per row of a padded batch; drop packing.")
        for record, call in zip(self.records, calls_of(self.config), strict=True):
            other = sorted(stats_of([call]) - _READS)
            why = (
                f"is {record.family}" if record.family not in ("pairwise", "listwise")
                else f"reads {len(record.rows)} answers" if len(record.rows) > 2
                else f"reads {' and '.join(other)} of a vocabulary" if other
                else "weighs tokens" if record.weights is not None
                else "adds a likelihood" if call.supervised
                else "keeps a state" if record.update is not None
                else ""
            )  # fmt: skip
            if why:
                usable = [n for n, r in losses.LOSSES.items() if r.family == "listwise"]
                raise ValueError(
                    f"loss {record.name!r} {why}, and a reward model has one score per answer: "
                    f"losses of pairs or lists can read it ({', '.join(usable[:4])}, ...)."
                )
