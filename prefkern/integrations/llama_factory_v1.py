"""LLaMA-Factory v1's DPO without logits.

    from prefkern.integrations import llama_factory_v1
    llama_factory_v1.use()               # before llamafactory.v1.trainers.dpo_trainer.run_dpo(...)

Read: the repository at ff6d4d1; in 0.9.5 v1's trainer is an empty file. Its losses (sigmoid, orpo,
simpo, pref_ftx, ld_alpha) keep its own formulas on prefkern's log-probabilities. `logits/chosen`
and `logits/rejected` are means over labelled positions, where v1 counts the prompt's.

Shapes: B rows of T tokens, the chosen answer's conversation and behind it the rejected one's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..ops.linear_stats import linear_logps
from ..stats import TokenStats
from . import signatures
from .head import ensure_head
from .head_view import IGNORE, View, shifted
from .llama_factory import replace_class, sequence_sums

TESTED = "llamafactory at ff6d4d1"
TRAINER = "llamafactory.v1.trainers.dpo_trainer"
_EXTRACT = ("self", "logits", "labels", "token_type_ids", "use_ld")
_KINDS = {"chosen": 1, "rejected": 2}  # of token_type_ids


def trainer_class(base: Any) -> Any:
    """`base` (v1's DPOTrainer or a subclass) with log-probabilities from the head.

    Raises:
        ImportError: a function of it is not the one that was read.
    """
    signatures.check(base.compute_loss, ("self", "batch"), TESTED)
    signatures.check(base._extract_chosen_rejected_logps, _EXTRACT, TESTED)

    class PrefkernDPOTrainer(base):
        def compute_loss(self, batch: dict[str, Tensor]) -> Tensor:
            targets = shifted(batch["labels"].to(self.device))
            seen: list[Tensor] = []
            with ExitStack() as stack:
                for model in (self._unwrapped_model, self.ref_model):
                    if model is not None:
                        stack.enter_context(_log_probabilities(model, targets, seen))
                loss: Tensor = super().compute_loss(batch)
            kinds = batch["token_type_ids"].to(self.device)[:, 1:]
            for side, kind in _KINDS.items():
                at = (targets[:, :-1] != IGNORE) & (kinds == kind)
                mean = seen[0][:, :-1][at].double().sum() / at.sum().clamp(min=1)
                self._step_metrics[f"logits/{side}"] = mean.item()
            return loss

        def _extract_chosen_rejected_logps(
            self, logits: Tensor, labels: Tensor, token_type_ids: Tensor, use_ld: bool = True
        ) -> tuple[Tensor, ...]:
            logp, kinds = logits[:, :-1, 0], token_type_ids[:, 1:]
            sides = [(kinds == kind) & (labels[:, 1:] != IGNORE) for kind in _KINDS.values()]
            lengths = [side.sum(1) for side in sides]
            alpha = self.ld_alpha if use_ld else None
            sums = [sequence_sums(logp, side, torch.minimum(*lengths), alpha) for side in sides]
            means = [s / (n + 1e-6) for s, n in zip(sums, lengths, strict=True)]
            return (*sums, *means)

    return PrefkernDPOTrainer


@contextmanager
def _log_probabilities(model: Any, targets: Tensor, seen: list[Tensor]) -> Iterator[None]:
    """Within the block a call of `model` returns log-probabilities [B, T, 1] for logits, and `seen`
    gets the mean logits [B, T]. Hooks on the module itself, so DDP and FSDP wrap them."""
    from transformers.modeling_outputs import CausalLMOutput

    ensure_head(model)

    def compute(view: View) -> TokenStats:
        at = targets.to(view.hidden.device)
        return linear_logps(view.hidden, view.head, at, stats=("logp", "zmean"))

    def ask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "at_head": compute}

    def answer(module: Any, args: Any, output: Any) -> CausalLMOutput:
        seen.append(output.value.zmean.detach())
        return CausalLMOutput(logits=output.value.logp[..., None])

    handles = (
        model.register_forward_pre_hook(ask, with_kwargs=True),
        model.register_forward_hook(answer),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def use() -> Any:
    """From now on v1's run_dpo trains with this trainer; returns the class."""
    return replace_class(TRAINER, "DPOTrainer", trainer_class, TESTED)
