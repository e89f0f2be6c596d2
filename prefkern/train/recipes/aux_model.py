"""A second frozen model beside the reference: a DPO-trained one, whose log-ratios are token rewards
(TGDPO, RTO), or one whose whole distribution a loss reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ... import losses
from ...integrations import hf
from ...integrations.loss_at_head import read_other
from ...integrations.output_layer import output_layer_of
from ...losses.record import Loss
from .. import reference_cache
from ..config import TrainConfig
from ..data import Example
from ..demands import calls_of, stats_of
from ..forward import inputs_of
from ..providers import Micro, Opened, Provider
from ..reference import ReferenceRows, token_logps
from .answer_logps import answer_logps

NAME = "aux_logp"


class AuxModel(Provider):
    """`aux_logp` [N], and hidden states and head for losses that read the whole distribution."""

    offers = dict.fromkeys((NAME,), "--aux-model or --precomputed-aux")

    def __init__(self, config: TrainConfig, records: Sequence[Loss]) -> None:
        super().__init__(config, records)
        self.logp, self.head = reads_logp(config, records), reads_head(config)
        self.model: hf.Model = None

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        given = config.aux_model is not None or config.precomputed_aux is not None
        return given or reads_logp(config, records) or reads_head(config)

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset({NAME}) if self.logp else frozenset()

    def check(self) -> None:
        config, names = self.config, ", ".join(self.config.loss)
        if not (self.logp or self.head):
            raise ValueError(
                f"loss {names} reads no second frozen model, or a column gives what "
                "it reads of one; drop aux_model and precomputed_aux."
            )
        stored = config.precomputed_aux is not None and not self.head
        if config.aux_model is None and not stored:
            also = f" (or columns, --column {NAME}=NAME)." if self.logp else "."
            raise ValueError(f"loss {names} reads a second frozen model: pass --aux-model{also}")

    def on_examples(self, examples: list[Example]) -> list[Example]:
        path = self.config.precomputed_aux
        if path is None:
            return examples
        stored = reference_cache.find(path, examples, same_tokens=True)
        return reference_cache.attach(examples, NAME, stored)

    def open(self, opened: Opened) -> None:
        if self.config.aux_model is None:
            return
        self.model = opened.frozen(self.config.aux_model)
        if self.head:
            reference = opened.reference.model
            ours = output_layer_of(opened.policy if reference is None else reference)
            theirs = output_layer_of(self.model)
            biased = any(layer.parameters[1] is not None for layer in (ours, theirs))
            if biased or ours.options != theirs.options:
                raise ValueError(
                    f"loss {', '.join(self.config.loss)} forms the aux model's logits with the "
                    "reference's scale and cap and without a bias; --aux-model and --ref-model "
                    "must agree in them."
                )

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        batch, given = micro.batch, dict[str, Any]()
        if self.head:
            with inputs_of(self.model, batch) as inputs:
                given["aux"] = read_other(self.model, inputs, batch.targets, distribution=True)
        if self.logp:
            stored = batch.numbers.get(NAME)
            logp = token_logps(self.model, batch, self.config) if stored is None else stored
            given[NAME] = logp.flatten()
        return given


def reads_logp(config: TrainConfig, records: Sequence[Loss]) -> bool:
    """Whether a loss reads a second model's log-probabilities and no column gives them."""
    needed = any(NAME in losses.required(record) for record in records)
    return needed and NAME not in config.columns


def reads_head(config: TrainConfig) -> bool:
    """Whether a loss reads the whole distribution of a second model."""
    return "ev" in stats_of(calls_of(config))


def with_token_rewards(
    rows: Sequence[Mapping[str, Any]], model: hf.Model, tokenizer: Any, config: TrainConfig
) -> list[dict[str, Any]]:
    """Rows of pairs with `chosen_aux_logp` and `rejected_aux_logp`: per token, under `model`.

    The columns by which tgdpo reads a DPO-trained model (--column aux_logp=aux_logp). Rows that the
    model or the tokenizer cannot take are left out.

    Args:
        rows: With `prompt`, `chosen` and `rejected` as text.
        model: Any causal model over the policy's tokens, for instance the result of a dpo run.
        tokenizer: The policy's.
        config: max_length, append_eos, dtype and backend are read.
    """
    sides = [
        answer_logps(model, tokenizer, rows, [row[side] for row in rows], config)
        for side in ("chosen", "rejected")
    ]
    return [
        {**row, "chosen_aux_logp": one.tolist(), "rejected_aux_logp": other.tolist()}
        for row, one, other in zip(rows, *sides, strict=True)
        if one is not None and other is not None
    ]
