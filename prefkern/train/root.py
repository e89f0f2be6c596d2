"""The module that a run hands to accelerate, and the one way into the models of a run.

A sharded model gathers its weights while the forward of its root runs: a block called from outside
would find a slice of them. So every call of the policy, in a step, an evaluation or a check, goes
through `root(compute)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..integrations import hf
from .step import PreferenceStep


class Root(nn.Module):
    """forward(compute, *arguments) -> compute(*arguments), with the run's weights at hand.

    Beside it stands what accelerate asks a transformers model for before it shards it.
    """

    base_model_prefix = "backbone"  # where accelerate looks for the norm before the head

    def __init__(self, step: PreferenceStep) -> None:
        super().__init__()
        self.step = step

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        return compute(*arguments)

    @property
    def _model(self) -> Any:
        return hf.causal_lm(self.step.policy)

    @property
    def backbone(self) -> Any:
        return hf.backbone(self.step.policy)

    @property
    def config(self) -> Any:
        return self._model.config

    @property
    def tp_size(self) -> int | None:
        return getattr(self._model, "tp_size", None)

    @property
    def _no_split_modules(self) -> list[str]:
        return sorted(getattr(self._model, "_no_split_modules", None) or ())

    def get_input_embeddings(self) -> nn.Module:
        return self._model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self._model.get_output_embeddings()

    def tie_weights(self) -> None:
        self._model.tie_weights()
