"""Checks on losses, model and data before the first step; each refuses with what to do."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import losses
from ..integrations import hf, packed_attention
from ..losses.record import Loss
from . import masks as mask_module
from .config import TrainConfig, nearest
from .data import Example, collate
from .states import rule_of

# Losses over pairs or lists read no other rows; those over sequences or tokens read any.
LAYOUT_OF = {"pairwise": "pairs", "listwise": "lists"}
# Packed and alone differ by rounding alone; a leak between sequences costs tenths of a nat.
PACKING_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def check_losses(config: TrainConfig) -> list[Loss]:
    """The records of config.loss.

    Raises:
        ValueError: an unknown loss, or an argument that none of the losses has.
    """
    records = [losses.resolve(name)[0] for name in config.loss]
    for record in records:
        if record.family == "diffusion":
            raise ValueError(
                f"loss {record.name!r} compares prediction errors of a diffusion model, which has "
                f"no language-model head to train here; call prefkern.losses.{record.name} on "
                "prefkern.error_sum from a loop of your own."
            )
    known = {name for record in records for name in losses.arguments(record)}
    if any("reward_mask" in losses.required(record) for record in records):
        known |= set(mask_module.OPTIONS)
    known |= {name for r in records if (rule := rule_of(r)) for name in rule.options}
    for name in config.loss_args:
        if name not in known:
            near = nearest(name, known) or f"; known: {', '.join(sorted(known)) or 'none'}"
            raise ValueError(f"loss {', '.join(config.loss)} has no argument {name!r}{near}.")
    return records


def layout_of(record: Loss) -> str | None:
    """The layout of rows a loss trains on; None: any."""
    return "unpaired" if "desirable" in record.extra else LAYOUT_OF.get(record.family)


def check_family(records: list[Loss], layout: str, *, score_prompt: bool = False) -> None:
    for record in records:
        wanted = layout_of(record)
        if wanted not in (None, layout):
            raise ValueError(
                f"loss {record.name!r} is {record.family} and trains on {wanted}, but the data are "
                f"{layout}; choose another loss (prefkern losses) or other data."
            )
        if score_prompt and "kl_baseline" in record.extra:
            raise ValueError(
                f"loss {record.name!r} compares prompts with other rows' answers, which "
                "score_prompt leaves no boundary between; drop score_prompt."
            )


def check_first_batch(model: hf.Model, examples: list[Example], config: TrainConfig) -> float:
    """The model's own logits against the fused head on the first group, at most 256 tokens each."""
    batch = collate(examples[:1], packed=False).to(next(model.parameters()).device)
    longest = 256 if batch.targets[:, :256].ne(-100).any() else batch.targets.shape[1]
    assert batch.attention_mask is not None  # padded
    return hf.check_head(
        model,
        batch.input_ids[:, :longest],
        batch.targets[:, :longest],
        position_ids=batch.position_ids[:, :longest],
        attention_mask=batch.attention_mask[:, :longest],
        backend=config.backend,
    )


def packing_difference(model: hf.Model, examples: list[Example], config: TrainConfig) -> float:
    """Largest difference in nats between packed log-probabilities and each sequence alone."""
    sequences = [s for e in examples[:2] for s in e.sequences][:4]
    alone = [Example(row=0, sequences=(s,)) for s in sequences]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()

    def logps(examples: list[Example]) -> torch.Tensor:  # [n], scored rows
        batch = collate(examples, packed=True).to(device)
        out = hf.fused_logps(
            model, batch.input_ids, batch.targets,
            position_ids=batch.position_ids, attention_mask=None, backend=config.backend,
        )  # fmt: skip
        return out[batch.targets != -100]

    packed = logps(alone)
    single = torch.cat([logps([example]) for example in alone])
    model.train(was_training)
    return (packed - single).abs().max().item() if packed.numel() else 0.0


def choose_packing(
    say: Callable[[str], None], model: hf.Model, examples: list[Example], config: TrainConfig
) -> bool:
    """Whether batches are packed; where that is wrong or wasteful they are padded, and said so."""
    if config.packing == "off":
        return False
    inner = hf.causal_lm(model)
    varlen = packed_attention.use(inner, config.max_length)
    attention = str(hf.text_config(model)._attn_implementation)
    limit = PACKING_LIMIT[next(model.parameters()).dtype]
    must = config.packing == "on" or config.token_budget is not None
    if not hf.takes_position_ids(model):
        reason = f"{type(hf.backbone(model)).__name__} takes no position_ids"
    elif not (varlen or must or attention.startswith("flash") or attention == "flex_attention"):
        reason = (
            f"{attention} attention would mask a packed batch at the square of its total length"
        )
    elif (found := packing_difference(model, examples, config)) > limit:
        reason = (
            f"packed log-probabilities differ by {found:.3g} nats from each sequence alone "
            f"(limit {limit:g}, {attention} attention)"
        )
    else:
        return True
    if must:
        raise ValueError(
            f"batches cannot be packed: {reason}; use packing=off and no token_budget."
        )
    packed_attention.stop(inner)
    say(f"batches are padded, not packed: {reason}.")
    return False
