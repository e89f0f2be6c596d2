"""LLaMA-Factory's DPO without logits (v0, `stage: dpo`; v1 is in `llama_factory_v1`).

    from prefkern.integrations import llama_factory
    llama_factory.use()                  # before run_exp, or: llama_factory.run_dpo(...)

Read: 0.9.5. Its loss types (sigmoid, hinge, ipo, kto_pair, orpo, simpo, ld_alpha, bco) keep its own
formulas on prefkern's log-probabilities. `logits/chosen` and `logits/rejected` are means over
labelled positions.

Shapes: B rows of T tokens, chosen first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.linear_stats import linear_logps
from ..stats import TokenStats
from . import signatures
from .head import ensure_head
from .head_view import IGNORE, View, shifted

TESTED = "llamafactory 0.9.5"
TRAINER = "llamafactory.train.dpo.trainer"
_AVERAGED = ("ipo", "orpo", "simpo")


def trainer_class(base: Any) -> Any:
    """`base` (CustomDPOTrainer or a subclass) with log-probabilities from the head.

    Raises:
        ImportError: its concatenated_forward is not the one that was read.
    """
    signatures.check(
        base.concatenated_forward,
        ("self", "model", "batch", "is_ref_model"), TESTED,
    )  # fmt: skip

    class PrefkernDPOTrainer(base):
        def concatenated_forward(
            self, model: Any, batch: dict[str, Tensor], is_ref_model: bool = False
        ) -> dict[str, Tensor]:
            ensure_head(self.accelerator.unwrap_model(model))
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            targets = shifted(batch["labels"])

            def compute(view: View) -> TokenStats:
                return linear_logps(
                    view.hidden, view.head, targets.to(view.hidden.device),
                    stats=("logp", "zmean"),
                )  # fmt: skip

            tokens = model(**inputs, use_cache=False, at_head=compute).value
            scored = targets != IGNORE
            length = scored.sum(1)
            alpha = None if is_ref_model else self.ld_alpha
            shorter = torch.minimum(*length.chunk(2)).repeat(2)
            sums = sequence_sums(tokens.logp, scored, shorter, alpha)
            logps = sums / length if self.loss_type in _AVERAGED else sums
            half = len(targets) // 2
            chosen, rejected = logps.split(half)
            means = [
                z[m] for z, m in zip(tokens.zmean.split(half), scored.split(half), strict=True)
            ]
            average = chosen if self.loss_type in _AVERAGED else chosen / length[:half]
            return {
                "chosen_logps": chosen, "rejected_logps": rejected, "chosen_logits": means[0],
                "rejected_logits": means[1], "chosen_logps_avg": average,
            }  # fmt: skip

    return PrefkernDPOTrainer


def sequence_sums(
    logp: Tensor, scored: Tensor, shorter: Tensor, ld_alpha: float | None
) -> Tensor:  # fmt: skip
    """Sums [B] of log-probabilities [B, T] where `scored`; with `ld_alpha` (LD-DPO) positions count
    by that factor from `shorter` [B], the length of the pair's shorter answer, after the first."""
    logp = logp * scored
    if ld_alpha is None:
        return logp.sum(1)
    position = torch.arange(logp.shape[1], device=logp.device)
    beyond = position >= (scored.int().argmax(1) + shorter)[:, None]
    return torch.where(beyond, ld_alpha * logp, logp).sum(1)


def use() -> Any:
    """From now on LLaMA-Factory's run_dpo, which imports its trainer when it is called, trains with
    this one; returns the class."""
    return replace_class(TRAINER, "CustomDPOTrainer", trainer_class, TESTED)


def replace_class(path: str, name: str, made: Any, tested: str) -> Any:
    """Puts made(class) where the module at `path` has `name`, once; returns it."""
    base = signatures.imported(f"{path}:{name}", tested)
    package, _, module = path.rpartition(".")
    if not getattr(base, "_prefkern", False):
        base = made(base)
        base._prefkern = True
        setattr(signatures.imported(f"{package}:{module}", tested), name, base)
    return base


def run_dpo(*args: Any, **kwargs: Any) -> Any:
    """LLaMA-Factory's run_dpo with this trainer."""
    use()
    return signatures.imported("llamafactory.train.dpo.workflow:run_dpo", TESTED)(*args, **kwargs)
