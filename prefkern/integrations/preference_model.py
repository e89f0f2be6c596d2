"""Policy and loss as one module, for any loop: its forward returns the loss.

Whatever wraps it (DistributedDataParallel, FSDP2, Accelerate, a Trainer, Lightning) sees the loss
computed inside the wrapped forward, so gradients are synchronised as ever.

Shapes: S sequences in rows of T tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import losses
from ..stats import ONE_MODEL_STATS
from . import hf, packed_attention
from .head import at_head
from .head_view import shifted
from .loss_at_head import Other, loss_at_head, read_other, with_router_loss
from .verify import verify_head

# Arguments of a call that preference_loss reads, beside those of the losses.
_ROWS = frozenset({
    "cu_groups", "relevance", "desirable", "token_weights", "item_weights", "num_items", "layout",
    "ref_logp", "ref_seq_logp", "values", "state_arguments",
})  # fmt: skip


class PreferenceOutput(NamedTuple):
    loss: Tensor  # scalar
    metrics: dict[str, Tensor]  # detached 0-d tensors


class PreferenceModel(nn.Module):
    """forward(input_ids, labels, ...) -> (loss, metrics).

    Its parameters and its state dict are the policy's, under `model.`; the other models move with
    it and are in neither.

    Args:
        model: A transformers causal model, or a PEFT model around one.
        loss: A name of `prefkern.LOSSES` with or without arguments behind it, or several.
        ref: The reference. Default None: the policy without its adapters where it is a PEFT model;
            else the reference's log-probabilities come with every batch.
        aux: The third, frozen model that some losses read. Default None.
        loss_weights: One factor per loss. Default 1 each.
        layout: How rows form pairs: "pairs" (chosen, rejected neighbours, the default), "halves".
        packed: Take padding out before the backbone, as in `at_head`. Default False.
        metrics: As in `preference_loss`. Default True.
        memory_budget, backend: As in `linear_logps`.
        **loss_args: The losses' own.

    Raises:
        ValueError: an unknown loss or argument, models whose log-probabilities at the head are not
            those of their own logits, a third model that no loss reads.
    """

    accepts_loss_kwargs = False  # the Trainer divides by the accumulation steps itself

    def __init__(
        self,
        model: nn.Module,
        loss: str | Sequence[str] = "dpo",
        *,
        ref: nn.Module | None = None,
        aux: nn.Module | None = None,
        loss_weights: Sequence[float] | None = None,
        layout: str = "pairs",
        packed: bool = False,
        metrics: bool = True,
        memory_budget: int | None = None,
        backend: str = "auto",
        **loss_args: Any,
    ) -> None:
        super().__init__()
        names = [loss] if isinstance(loss, str) else list(loss)
        self._read(names, loss_args, aux is not None)
        if ref is not None and not self._reference:
            raise ValueError(f"loss {', '.join(names)} reads no reference; drop ref.")
        for other in (model, *(m for m in (ref, aux) if m is not None)):
            if packed:
                packed_attention.use(hf.causal_lm(other), sys.maxsize)
            at_head(other, packed=packed)
            verify_head(other, backend=backend)
        self.model = model
        # in a tuple: no submodules, so neither saved nor wrapped with the policy
        self._others = tuple(
            None if other is None else other.requires_grad_(False).eval() for other in (ref, aux)
        )
        self._call = {
            "loss": names, "loss_weights": loss_weights, "layout": layout, "metrics": metrics,
            "memory_budget": memory_budget, "backend": backend, **loss_args,
        }  # fmt: skip

    def _read(self, names: list[str], loss_args: Mapping[str, Any], third: bool) -> None:
        """What the losses read of other models and of a batch."""
        records, stats = [], set[str]()
        self._reference = self._distribution = False
        for name in names:
            record, own = losses.resolve(name)
            known = losses.arguments(record)
            given = {**{k: v for k, v in loss_args.items() if k in known}, **own}
            call = losses.bind(record, given, supplied=(*losses.required(record), "desirable"))
            stats |= {stat.partition(":")[0] for stat in call.stats}
            self._reference |= call.needs_reference
            records.append(record)
        losses.check_arguments(records, loss_args)
        self._distribution = bool(stats - {"ref_logp", *ONE_MODEL_STATS})
        self._reference |= self._distribution
        self._third = "head" if "ev" in stats else ""
        wanted = {name for record in records for name in losses.required(record)}
        if third and not self._third:
            if "aux_logp" not in wanted:
                raise ValueError(f"loss {', '.join(names)} reads no third model; drop aux.")
            self._third = "logp"
        self._loss_inputs = {name for r in records for name in losses.arguments(r)} | _ROWS

    def forward(
        self,
        input_ids: Tensor | None = None,  # [S, T]
        labels: Tensor | None = None,  # [S, T]
        attention_mask: Tensor | None = None,  # [S, T]
        **inputs: Any,
    ) -> PreferenceOutput:
        """The loss of a batch.

        Args:
            input_ids, attention_mask: Of the model.
            labels: `[S, T]`, -100 where a token is not scored, not shifted (as transformers has
                them). Or `shift_labels`, shifted already.
            **inputs: Tensors that the losses read (`desirable`, `cu_groups` and `relevance`,
                `item_weights`, `ref_logp`, `ref_seq_logp` ...); the rest goes to the model.

        Raises:
            ValueError: no labels, and as `preference_loss`.
        """
        targets = inputs.pop("shift_labels", None)
        if (targets is None) == (labels is None):
            raise ValueError("exactly one of labels and shift_labels must be given.")
        if labels is not None:
            targets = shifted(labels)
        given = {k: inputs.pop(k) for k in list(inputs) if k in self._loss_inputs}
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        arguments = {k: v for k, v in arguments.items() if v is not None}
        known = given.keys() & {"ref_logp", "ref_seq_logp"}
        reference = self._read_reference(arguments, targets) if not known else None
        aux: Other = None
        if self._others[1] is not None:
            aux = self._read_other(self._others[1], arguments, targets, self._third == "head")
        objective = loss_at_head(targets, reference=reference, aux=aux, **{**self._call, **given})
        out = self.model(**arguments, at_head=objective)
        return PreferenceOutput(*with_router_loss(self.model, out))

    def _read_reference(self, arguments: dict[str, Any], targets: Tensor) -> Other:
        if not self._reference:
            return None
        if self._others[0] is not None:
            return self._read_other(self._others[0], arguments, targets, self._distribution)
        if not hasattr(self.model, "disable_adapter"):
            raise ValueError(
                f"loss {', '.join(self._call['loss'])} reads a reference, and there is none: pass "
                "ref= to PreferenceModel, a PEFT model (its base is the reference), or ref_logp or "
                "ref_seq_logp with the batch."
            )
        peft: Any = self.model
        with peft.disable_adapter():
            return self._read_other(self.model, arguments, targets, self._distribution)

    def _read_other(
        self, model: Any, arguments: dict[str, Any], targets: Tensor, distribution: bool
    ) -> Other:
        quiet = _evaluating(model) if model is self.model else nullcontext()
        with quiet:
            return read_other(
                model, arguments, targets, distribution=distribution,
                backend=self._call["backend"],
            )  # fmt: skip

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreferenceModel:
        for other in self._others:
            if other is not None:
                other._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def config(self) -> Any:
        """The policy's, for trainers that read it."""
        return self.model.config

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the policy alone."""
        return self.model.save_pretrained(*args, **kwargs)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.model.gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[operator]


class _evaluating:
    """A model without dropout for one block."""

    def __init__(self, model: nn.Module) -> None:
        self.on = [module for module in model.modules() if module.training]

    def __enter__(self) -> None:
        for module in self.on:
            module.training = False

    def __exit__(self, *error: object) -> None:
        for module in self.on:
            module.training = True
