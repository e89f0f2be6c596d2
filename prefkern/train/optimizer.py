"""AdamW with its schedule, the clipping of gradients, and what rounding leaves of an update."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .sharded import is_sharded, local, whole
from .step import PreferenceStep


def make_optimizer(step: PreferenceStep, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, and groups of the providers' own."""
    from transformers.trainer_pt_utils import get_parameter_names

    no_decay = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(step, [nn.LayerNorm], no_decay))
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "weight_decay": config.weight_decay},
        "no_decay": {"params": [], "weight_decay": 0.0},
    }
    for name, parameter in step.named_parameters():
        if not parameter.requires_grad:
            continue
        own = [found for p in step.providers if (found := p.parameter_group(name)) is not None]
        group, options = own[0] if own else ("decay" if name in decayed else "no_decay", {})
        groups.setdefault(group, {"params": [], **options})["params"].append(parameter)
    return torch.optim.AdamW(
        [group for group in groups.values() if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        # tensor parallelism leaves some weights whole, and one call takes no mixture of kinds
        foreach=False if is_sharded(step) else None,
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule of the learning rate.

    Raises:
        ValueError: a schedule that does not follow the step number, or leaves every step at 0.
    """
    from transformers import get_scheduler

    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    try:
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
        )
    except (TypeError, ValueError) as error:
        reason = str(error)
        if isinstance(error, TypeError) or "lr_scheduler_kwargs" in reason:
            reason = "it has settings of its own, for which there is no option here; choose another"
        raise ValueError(f"lr_scheduler_type {config.lr_scheduler_type}: {reason}") from error
    if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        raise ValueError(
            f"lr_scheduler_type {config.lr_scheduler_type} follows a metric, which no step has; "
            "choose one that follows the step number (linear, cosine, constant_with_warmup, ...)."
        )
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    first = range(min(total_steps, 10))  # a warm-up begins at 0 and has left it by then
    if not any(rate * factor(step) for rate, factor in rates for step in first):
        raise ValueError(
            f"the learning rate is 0 in every step (learning_rate {config.learning_rate:g}, "
            f"{warmup} steps of warm-up of {total_steps}), so nothing would be trained; raise "
            "learning_rate, or lower warmup_steps or warmup_ratio."
        )
    return scheduler


def take_step(optimizer: Any, rate: float, number: int) -> None:
    """One step of the optimizer.

    Raises:
        ValueError: an update that its numbers cannot hold.
    """
    try:
        optimizer.step()
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError(
            f"step {number} cannot be taken at a learning rate of {rate:g} ({error}); lower "
            "learning_rate."
        ) from error


@torch.no_grad()
def rounded_away(step: nn.Module, rate: float) -> float:
    """Share of trained bfloat16 weights that an Adam update of size `rate` leaves as they are, read
    off at most 65536 of each matrix: half a unit in the last place is at least |w| / 512."""
    stuck = total = 0
    for parameter in step.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            own = local(parameter)
            values = own.flatten()[:: max(1, own.numel() // 65536)].float().abs()
            stuck += int((values > 512 * rate).sum())
            total += values.numel()
    return stuck / max(total, 1)


def clip(accelerator: Any, root: nn.Module, limit: float) -> Tensor:  # []
    """Gradient norm over all processes before clipping; with limit 0 nothing is clipped."""
    norm = accelerator.clip_grad_norm_(root.parameters(), limit if limit > 0 else math.inf)
    if isinstance(norm, float | int):  # DeepSpeed's, which clips itself; -1 where it is no number
        return torch.tensor(norm if norm >= 0 else math.nan)
    return whole(norm)
