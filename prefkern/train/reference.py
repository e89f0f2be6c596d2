"""Where the reference of a run comes from, and everything else that is computed without gradient.

A second model, the policy with its adapter switched off, log-probabilities computed beforehand, or
columns of the data. Shapes: [B, T] as the batch has it, n scored rows, L layers, M hooks.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Indices
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..integrations import hf
from ..ops.linear_logps import linear_logps
from ..stats import TWO_MODEL_STATS, SeqStats
from . import activations
from .config import TrainConfig
from .data import Example, PreferenceBatch, Sequence, collate
from .reference_cache import ReferenceCache


@dataclass(frozen=True)
class Needs:
    """What the losses of a run ask of the loop, read off their records."""

    reference: bool  # log-probabilities under a reference
    distribution: bool  # the reference's whole distribution (a KL and the like)
    tokens: bool  # statistics per token, not only per sequence
    masks: bool  # sparsepo's learned masks
    activations: bool  # mapo's hook activations
    aux: bool  # log-probabilities under a second frozen model
    kl_baseline: bool  # kto's mismatched completions
    teacher: bool = False  # the reference is a teacher: another model than the policy's start
    aux_head: bool = False  # the second frozen model's whole distribution (adpa's advantage)

    @classmethod
    def of(
        cls, names: tuple[str, ...], loss_args: dict[str, Any], columns: Collection[str] = ()
    ) -> Needs:
        records, calls = [], []
        for name in names:
            record, fixed = losses.resolve(name)
            known = losses.arguments(record)
            given = fixed | {k: v for k, v in loss_args.items() if k in known}
            records.append(record)
            calls.append(losses.bind(record, given, supplied=losses.required(record)))
        extra = {name for record in records for name in losses.required(record)}
        stats = {stat.partition(":")[0] for call in calls for stat in call.stats}
        compared = set(TWO_MODEL_STATS) - {"ref_logp"}
        return cls(
            reference=any(call.needs_reference for call in calls),
            distribution=bool(stats & compared),
            tokens=any(r.weights or r.family == "tokenwise" for r in records),
            masks="reward_mask" in extra,
            activations="activations" in extra,
            aux="aux_logp" in extra and "aux_logp" not in columns,
            kl_baseline="kl_baseline" in extra,
            teacher=any(
                not call.needs_reference and compared & {s.partition(":")[0] for s in call.stats}
                for call in calls
            ),
            aux_head="ev" in stats,
        )


@dataclass
class ReferenceRows:
    """What one batch needs beside the policy; every tensor is a constant."""

    hidden: Tensor | None = None  # [B, T, D]
    head: hf.Head | None = None  # None: the policy's
    logp: Tensor | None = None  # [B, T]
    seq_logp: Tensor | None = None  # [S]
    aux_hidden: Tensor | None = None  # [B, T, D] of the second frozen model
    aux_head: hf.Head | None = None
    layers: Tensor | None = None  # [L, n, D], scored rows after every block
    loss_args: dict[str, Any] = field(default_factory=dict)


def choose_mode(config: TrainConfig, needs: Needs, has_adapter: bool) -> str:
    """none, cache, columns, adapter or model; raises ValueError for what cannot work."""
    mode: str = config.reference
    if mode == "auto":
        if not (needs.reference or needs.distribution):
            mode = "none"
        elif config.precomputed_ref:
            mode = "cache"
        elif has_adapter and config.ref_model is None and not config.sync_ref_model:
            mode = "adapter"
        else:
            mode = "model"
    if mode == "none" and config.sync_ref_model:
        raise ValueError(
            f"sync_ref_model moves a reference, but loss {list(config.loss)} has none."
        )
    if mode in ("model", "adapter") and needs.teacher and config.ref_model is None:
        raise ValueError(
            f"loss {', '.join(config.loss)} learns from a teacher: pass it as --ref-model (a copy "
            "of the model itself teaches nothing)."
        )
    if mode == "none" and (needs.reference or needs.distribution):
        raise ValueError(f"loss {list(config.loss)} needs a reference; reference=none gives none.")
    if mode == "adapter" and not has_adapter:
        raise ValueError(
            "reference=adapter switches the policy's adapter off, but it has none; set lora_r or "
            "use reference=model."
        )
    if mode in ("cache", "columns"):
        what = "precomputed log-probabilities" if mode == "cache" else "reference columns"
        lacking = [
            text
            for needed, text in (
                (
                    needs.distribution,
                    "the reference's whole distribution (a KL over the vocabulary)",
                ),
                (needs.masks or needs.activations, "the reference's hidden states"),
                (needs.kl_baseline, "the reference on mismatched completions"),
                (needs.tokens and mode == "columns", "one reference number per token"),
            )
            if needed
        ]
        if lacking:
            raise ValueError(
                f"loss {list(config.loss)} needs {' and '.join(lacking)}, which {what} cannot "
                "give; use reference=model."
            )
    return mode


class Reference:
    """Serves `ReferenceRows` for batches; holds no trainable parameter."""

    def __init__(
        self,
        mode: str,
        needs: Needs,
        config: TrainConfig,
        *,
        policy: hf.Model,
        model: hf.Model = None,
        aux: hf.Model = None,
        cache: ReferenceCache | None = None,
        aux_cache: ReferenceCache | None = None,
    ) -> None:
        self.mode, self.needs, self.config = mode, needs, config
        self.policy, self.model, self.aux, self.cache = policy, model, aux, cache
        self.aux_cache = aux_cache

    @torch.no_grad()
    def rows(self, batch: PreferenceBatch, indices: Indices[int]) -> ReferenceRows:
        """Reference inputs of `batch`, whose groups are the examples `indices`."""
        out = ReferenceRows()
        if self.mode == "cache":
            assert self.cache is not None
            out.logp = self.cache.token_logps(indices, batch.targets)
        elif self.mode == "columns":
            if batch.ref_seq_logp is None:
                raise ValueError(
                    "reference=columns needs ref_chosen_logps and ref_rejected_logps in every row, "
                    f"but rows {batch.rows} lack them; use reference=model."
                )
            out.seq_logp = batch.ref_seq_logp
        elif self.mode in ("model", "adapter"):
            self._forward(batch, out)
        if self.needs.aux_head:
            with self._autocast(batch):
                out.aux_hidden, _ = hf.hidden_states(
                    self.aux,
                    batch.input_ids,
                    position_ids=batch.position_ids,
                    attention_mask=batch.attention_mask,
                )
            out.aux_head = hf.read_head(self.aux)
        if self.needs.aux:
            if out.hidden is None and out.logp is None:
                raise ValueError(
                    "aux log-probabilities are compared with a reference; there is none."
                )
            if self.aux_cache is not None:
                aux_logp = self.aux_cache.token_logps(indices, batch.targets)
            else:
                aux_logp = self._logp(self.aux, batch)
            out.loss_args["aux_logp"] = aux_logp.flatten()
        return out

    def _forward(self, batch: PreferenceBatch, out: ReferenceRows) -> None:
        model = self.model if self.mode == "model" else self.policy
        off = nullcontext() if self.mode == "model" else hf.adapter_off(self.policy)
        training, self_eval = self.policy.training, self.mode == "adapter"
        if self_eval:
            self.policy.eval()  # no dropout in a reference
        layers = self.needs.masks or self.needs.activations
        scored = batch.targets != -100  # [B, T]
        with off, self._autocast(batch), activations.record(model, self.needs.activations) as hooks:
            out.hidden, states = hf.hidden_states(
                model,
                batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                layers=layers,
            )
            out.head = hf.read_head(model) if self.mode == "model" else None
            if self.needs.activations:
                head = hf.read_head(model)
                zmean = linear_logps(
                    out.hidden, head, batch.targets, stats=("zmean",),
                    backend=self.config.backend,
                ).zmean  # fmt: skip
                assert states is not None and zmean is not None
                out.loss_args |= hooks.collect(states, zmean)
        if self_eval:
            self.policy.train(training)
        if self.needs.masks:
            assert states is not None
            out.layers = states[:, scored]

    def _logp(self, model: hf.Model, batch: PreferenceBatch) -> Tensor:  # [B, T]
        with self._autocast(batch):
            return hf.fused_logps(
                model,
                batch.input_ids,
                batch.targets,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                backend=self.config.backend,
            )

    @torch.no_grad()
    def mismatched_logratio(
        self, examples: list[Example], *, packed: bool, pad_id: int, device: torch.device
    ) -> Tensor:  # [S]
        """Log-ratio of prompt i with the completion of prompt i - 1, for kto's baseline."""
        batch = collate(mismatch(examples, self.config.max_length), packed=packed, pad_id=pad_id)
        batch = batch.to(device)
        training = self.policy.training
        self.policy.eval()
        policy = self._logp(self.policy, batch)
        with nullcontext() if self.mode == "model" else hf.adapter_off(self.policy):
            reference = self._logp(self.model if self.mode == "model" else self.policy, batch)
        self.policy.train(training)
        difference = (policy - reference).double()
        if batch.cu_seqlens is None:
            return difference.sum(1)
        running = torch.cat([difference.new_zeros(1), difference.flatten().cumsum(0)])
        ends = running[batch.cu_seqlens.long()]
        return ends[1:] - ends[:-1]

    def _autocast(self, batch: PreferenceBatch) -> torch.autocast:
        return torch.autocast(
            batch.input_ids.device.type, dtype=torch.bfloat16, enabled=self.config.bf16
        )


def mismatch(examples: list[Example], max_length: int) -> list[Example]:
    """Prompt i with the completion of prompt i - 1 (rotation by one), cut at `max_length`."""
    import numpy as np

    rotated = []
    for example, before in zip(examples, examples[-1:] + examples[:-1], strict=True):
        own, other = example.sequences[0], before.sequences[0]
        ids = np.concatenate(
            [own.input_ids[: own.completion_start], other.input_ids[other.completion_start :]]
        )[:max_length]
        rotated.append(
            Example(
                row=example.row,
                sequences=(Sequence(ids, own.completion_start),),
                labels=example.labels,
            )
        )
    return rotated


def baseline_from(mean_logratio: Tensor) -> Tensor:  # []
    """kto's baseline from the mean over all ranks, through the loss's own rule."""
    from ..losses.pointwise.kto import kl_baseline

    # two equal rows: the warning about single-row batches is the loop's to give, once
    rows = mean_logratio.reshape(1).expand(2)
    return kl_baseline(SeqStats(logp=rows, ref_logp=torch.zeros_like(rows)))
