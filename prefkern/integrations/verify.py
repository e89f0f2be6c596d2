"""One short batch through a model's own logits and through at_head: do they say the same?

Shapes: B rows of T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..head import Head
from ..ops.linear_stats import linear_logps
from . import hf
from .head_view import IGNORE, View, padded, shifted

TOKENS = 8
LIMIT = 1e-4  # nats


@torch.no_grad()
def verify_head(model: Any, *, backend: str = "auto", gathers: bool = False) -> float | None:
    """Largest difference between log-probabilities at the head and those of the model's own logits.

    `at_head(model)` must have been called. Two rows of eight and five arbitrary tokens are scored,
    without dropout, with and, where the model is set so, without their padding; then again with
    another last token, which changes nothing before it in a causal model. Weights, random state and
    mode stay as they are.

    Args:
        model: After `at_head`.
        backend: As in `linear_logps`.
        gathers: Weights of ZeRO-3 come where their modules are called: the model is prepared, and
            every rank calls this.

    Returns:
        The difference in nats; None for weights that are not here to be read (meta tensors, ZeRO-3
        partitions without `gathers`) or whose logits are not finite.

    Raises:
        ValueError: a difference beyond 1e-4 plus what rounding logits to a 16-bit dtype costs: the
            family does to its logits, or to packed rows, what its config does not say; a token's
            log-probability depends on the tokens behind it.
    """
    parameters = list(model.parameters())
    if any(p.is_meta or (hasattr(p, "ds_id") and not gathers) for p in parameters):
        return None
    device = hf.causal_lm(model).get_input_embeddings().weight.device
    vocabulary = hf.text_config(model).vocab_size
    ids = torch.arange(2 * TOKENS, device=device).reshape(2, TOKENS) * 37 % vocabulary
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    targets = shifted(ids.masked_fill(mask == 0, IGNORE))
    heads: list[Head] = []

    def logps(view: View) -> Tensor:
        heads.append(view.head)
        out = linear_logps(view.hidden, view.head, targets.to(view.hidden.device), backend=backend)
        assert out.logp is not None
        return out.logp

    batch = {"input_ids": ids, "attention_mask": mask}
    with _quiet(model), torch.autocast(device.type, enabled=False):
        logits = model(**batch, use_cache=False).logits.float()  # [B, T, V]
        with padded(model) as packed:
            fused = [model(**batch, at_head=logps).value]
        fused += [model(**batch, at_head=logps).value] if packed else []
        ended = {**batch, "input_ids": torch.where(_last(ids), (ids + 1) % vocabulary, ids)}
        again = model(**ended, use_cache=False).logits.float()
    targets = targets.to(logits.device)
    scored = targets != IGNORE
    if not bool(torch.isfinite(logits[scored].amax(-1)).all()):
        return None
    picked = targets.clamp(min=0).unsqueeze(-1)
    own, other = (z.log_softmax(-1).gather(-1, picked).squeeze(-1) for z in (logits, again))
    dtype = heads[0].weight.dtype
    # own logits come rounded to the working dtype: eps * |z| each, in the target and in the lse
    slack = 0.0 if dtype in (torch.float32, torch.float64) else 2 * torch.finfo(dtype).eps
    largest = logits[scored]
    allowed = LIMIT + slack * largest[torch.isfinite(largest)].abs().max().item()
    if not (seen := (own - other)[scored].abs().max().item()) <= allowed:
        raise ValueError(
            f"{type(hf.causal_lm(model)).__name__}: the log-probability of a token depends on the "
            f"tokens behind it (by {seen:.3g} nats): it is no causal model; one of the masked kind "
            "needs is_decoder in its config, and training for it."
        )
    largest_difference = 0.0
    for values, is_packed in zip(fused, (False, True), strict=False):
        difference = (own - values.to(own.device))[scored].abs().max().item()
        if not difference <= allowed:
            _refuse(model, heads[0], difference, allowed, is_packed)
        largest_difference = max(largest_difference, difference)
    return largest_difference


def _last(ids: Tensor) -> Tensor:  # [B, T]: the last column
    return torch.arange(ids.shape[1], device=ids.device) == ids.shape[1] - 1


def _refuse(model: Any, head: Head, difference: float, allowed: float, packed: bool) -> None:
    name = type(hf.causal_lm(model)).__name__
    text = f"by {difference:.3g} nats (limit {allowed:.2g})"
    if packed:
        raise ValueError(
            f"{name}: log-probabilities of packed rows differ from those of padded ones {text}; it "
            "does not keep packed sequences apart by their positions: use packed=False "
            "(padding_free=False)."
        )
    raise ValueError(
        f"{name}: log-probabilities at the head differ from the model's own logits {text}, with "
        f"scale={head.scale:g}, softcap={head.softcap} read from the config; it treats its logits "
        "in a way prefkern does not know, so training would be wrong."
    )


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """Evaluation mode, module by module put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
