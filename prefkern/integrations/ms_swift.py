"""ms-swift's DPO without logits.

    from prefkern.integrations import ms_swift
    ms_swift.use()                       # before rlhf_main

Read: 4.6.0. Every loss type and option of ms-swift (padding_free, packing, ld_alpha, rpo) keeps its
formula; what its trainer takes for logits are log-probabilities and mean logits by the token. With
sequence parallelism its own path runs.

Shapes: B rows of T tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..ops.linear_stats import linear_logps
from . import signatures
from .head import ensure_head
from .head_view import IGNORE, View

TESTED = "ms-swift 4.6.0"
FACTORY = "swift.trainers.trainer_factory:TrainerFactory"
_KNOWN = {
    "concatenated_forward": ("self", "model", "batch", "is_ref_model"),
    "get_per_token_logps": ("self", "logits", "labels", "label_pad_token_id", "reduction"),
}


def trainer_class(base: Any) -> Any:
    """`base` (swift.rlhf_trainers.DPOTrainer or a subclass) with log-probabilities from the head.

    Raises:
        ImportError: a function of it is not the one that was read.
    """
    for name, want in _KNOWN.items():
        signatures.check(getattr(base, name), want, TESTED)

    class PrefkernDPOTrainer(base):
        def concatenated_forward(
            self, model: Any, batch: dict[str, Any], is_ref_model: bool = False
        ) -> Any:
            if self.is_encoder_decoder or self.template.sequence_parallel_size != 1:
                return super().concatenated_forward(model, batch, is_ref_model)
            ensure_head(self.accelerator.unwrap_model(model))
            pad = self.label_pad_token_id
            targets = torch.roll(batch["labels"], shifts=-1, dims=1)
            targets = targets.masked_fill(targets == pad, IGNORE)

            def at(**inputs: Any) -> Any:
                def compute(view: View) -> Tensor:
                    labels = _aligned(targets, view.hidden)
                    stats = linear_logps(view.hidden, view.head, labels, stats=("logp", "zmean"))
                    assert stats.logp is not None and stats.zmean is not None
                    return torch.stack([stats.logp, stats.zmean], -1)

                out = model(**inputs, at_head=compute)
                return SimpleNamespace(logits=out.value, aux_loss=out.aux_loss)

            return super().concatenated_forward(at, batch, is_ref_model)

        def get_use_logits_to_keep(self, *args: Any, **kwargs: Any) -> bool:
            return False  # ignored rows cost nothing anyway

        def get_per_token_logps(
            self, logits: Tensor, labels: Tensor, label_pad_token_id: int = IGNORE,
            reduction: str = "mean",
        ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
            if logits.shape[-1] != 2 or self.template.sequence_parallel_size != 1:
                return super().get_per_token_logps(logits, labels, label_pad_token_id, reduction)
            return logits[..., 0], logits[..., 1].detach(), labels != label_pad_token_id

    return PrefkernDPOTrainer


def _aligned(targets: Tensor, hidden: Tensor) -> Tensor:
    """Targets at the end of the rows where image tokens came in front."""
    front = hidden.shape[1] - targets.shape[1]
    targets = targets.to(hidden.device)
    return torch.nn.functional.pad(targets, (front, 0), value=IGNORE) if front > 0 else targets


def use() -> Any:
    """Registers the trainer under ms-swift's name `dpo`; returns the class."""
    base = signatures.imported("swift.rlhf_trainers:DPOTrainer", TESTED)
    factory = signatures.imported(FACTORY, TESTED)
    global DPOTrainer
    DPOTrainer = trainer_class(base)
    factory.TRAINER_MAPPING["dpo"] = f"{__name__}.DPOTrainer"
    return DPOTrainer


DPOTrainer: Any = None  # set by `use`, where ms-swift's registry looks it up
