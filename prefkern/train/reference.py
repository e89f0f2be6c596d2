"""Where the reference of a run comes from: a second model, the policy with its adapter switched
off, log-probabilities computed beforehand, or columns of the data.

Shapes: [B, T] as the batch has it, S sequences, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..integrations import hf
from ..integrations.loss_at_head import read_other
from ..integrations.reference import FrozenView
from ..objective.segments import segment_sum, sequence_boundaries
from .config import TrainConfig
from .data import PreferenceBatch
from .demands import ReferenceNeeds
from .forward import inputs_of, target_logps
from .models import autocast
from .sharded import Compute, called, is_sharded, reshard

CACHED = "ref_logp"  # under this name the numbers of precomputed_ref stand in a batch


@dataclass
class ReferenceRows:
    """What the reference says of one batch; every tensor is a constant."""

    # hidden states and head of a model; its layers [L, B, T, D] where a provider wants them
    states: FrozenView | None = None
    logp: Tensor | None = None  # [B, T]
    seq_logp: Tensor | None = None  # [S]


def choose_mode(
    config: TrainConfig,
    needs: ReferenceNeeds,
    *,
    has_adapter: bool,
    given_adapter: bool = False,
    moves: bool = False,
    further: Sequence[str] = (),
) -> str:
    """none, cache, columns, adapter or model; raises ValueError for what cannot work.

    Args:
        config, needs: Of the run.
        has_adapter: Whether the policy has one.
        given_adapter: Whether it came with the model. Switched off, it is not the model as given,
            so the reference is then a model of its own.
        moves: Whether the reference must have weights of its own.
        further: What is read of it that only a model gives, in words.
    """
    mode: str = config.reference
    if mode == "auto":
        if not needs.any:
            mode = "none"
        elif config.precomputed_ref:
            mode = "cache"
        elif has_adapter and not given_adapter and config.ref_model is None and not moves:
            mode = "adapter"
        else:
            mode = "model"
    if mode in ("model", "adapter") and needs.teacher and config.ref_model is None:
        raise ValueError(
            f"loss {', '.join(config.loss)} learns from a teacher: pass it as --ref-model (a copy "
            "of the model itself teaches nothing)."
        )
    if mode == "none" and needs.any:
        raise ValueError(f"loss {list(config.loss)} needs a reference; reference=none gives none.")
    if mode == "adapter" and not has_adapter:
        raise ValueError(
            "reference=adapter switches the policy's adapter off, but it has none; set lora_r or "
            "use reference=model."
        )
    if mode in ("cache", "columns"):
        _check_stored(mode, config, needs, further)
    return mode


def _check_stored(
    mode: str, config: TrainConfig, needs: ReferenceNeeds, further: Sequence[str]
) -> None:
    """Refuses stored numbers where more is read of a reference."""
    lacking = list(further)
    if needs.distribution:
        lacking.insert(0, "the reference's whole distribution (a KL over the vocabulary)")
    if needs.tokens and mode == "columns":
        lacking.append("one reference number per token")
    if lacking:
        what = "precomputed log-probabilities" if mode == "cache" else "reference columns"
        raise ValueError(
            f"loss {list(config.loss)} needs {' and '.join(lacking)}, which {what} cannot "
            "give; use reference=model."
        )


class Reference:
    """Serves `ReferenceRows` for batches; holds no trainable parameter.

    Args:
        mode: Of `choose_mode`.
        config: Of the run.
        policy: For the mode "adapter", and for `logratio`.
        root: The way into the policy.
        model: Frozen, for the mode "model". Like the policy it was given `at_head`.
        layers: Whether the hidden states after every block are wanted.
        watch: Contexts that are open while the reference's forward runs.
    """

    def __init__(
        self,
        mode: str,
        config: TrainConfig,
        *,
        policy: hf.Model,
        root: Compute = called,
        model: hf.Model = None,
        layers: bool = False,
        watch: Sequence[Callable[[hf.Model], AbstractContextManager[None]]] = (),
    ) -> None:
        self.mode, self.config, self.policy, self.model = mode, config, policy, model
        self.layers, self.watch, self.root = layers, watch, root
        self._sharded: bool | None = None  # known once the policy was prepared

    @torch.no_grad()
    def rows(self, batch: PreferenceBatch) -> ReferenceRows:
        """Reference inputs of `batch`."""
        if self.mode == "cache":
            return ReferenceRows(logp=batch.numbers[CACHED])
        if self.mode == "columns":
            return ReferenceRows(seq_logp=batch.ref_seq_logp)
        if self.mode == "none":
            return ReferenceRows()
        return self._forward(batch)

    def _forward(self, batch: PreferenceBatch) -> ReferenceRows:
        if self.mode == "model":
            return self._read(self.model, batch)
        with self._adapter_off():
            return self.root(self._read, self.policy, batch)

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        """The policy without its adapter and without dropout."""
        if self._sharded is None:
            self._sharded = is_sharded(self.policy)
        flags = []
        if self._sharded:
            reshard(self.policy)
            flags = [(p, p.requires_grad) for p in self.policy.parameters()]
        training = self.policy.training
        self.policy.eval()
        try:
            with hf.adapter_off(self.policy):
                yield
        finally:
            self.policy.train(training)
            # PEFT freezes an adapter that is off, and frees the weights that are there at its end:
            # with FSDP2 those may be gathered ones, and the optimizer's would stay frozen
            if self._sharded:
                reshard(self.policy)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def _read(self, model: hf.Model, batch: PreferenceBatch) -> ReferenceRows:
        with ExitStack() as stack:
            stack.enter_context(autocast(self.config, batch.input_ids.device.type))
            for watch in self.watch:
                stack.enter_context(watch(model))
            inputs = stack.enter_context(inputs_of(model, batch))
            states = read_other(model, inputs, batch.targets, distribution=True, layers=self.layers)
        return ReferenceRows(states=cast(FrozenView, states))

    @torch.no_grad()
    def logratio(self, batch: PreferenceBatch) -> Tensor:  # [S] fp64
        """Log-ratio of policy and reference of every sequence, without gradient or dropout."""
        training = self.policy.training
        self.policy.eval()
        policy = self.root(token_logps, self.policy, batch, self.config)
        if self.mode == "model":
            reference = token_logps(self.model, batch, self.config)
        else:
            with self._adapter_off():
                reference = self.root(token_logps, self.policy, batch, self.config)
        self.policy.train(training)
        return sequence_sums(policy - reference, batch)


@torch.no_grad()
def token_logps(
    model: hf.Model, batch: PreferenceBatch, config: TrainConfig
) -> Tensor:  # [B, T], 0 where nothing is scored
    """Log-probabilities of a batch's targets under any model of the run, in its compute type."""
    with autocast(config, batch.input_ids.device.type):
        return target_logps(model, batch, backend=config.backend)


def sequence_sums(values: Tensor, batch: PreferenceBatch) -> Tensor:  # [B, T] -> [S] fp64
    """Sums over the tokens of each sequence."""
    return segment_sum(values.flatten(), sequence_boundaries(batch.targets, batch.cu_seqlens))
