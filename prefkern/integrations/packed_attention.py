"""Scaled-dot-product attention over packed sequences, one call per sequence.

transformers runs a packed batch of T tokens under a dense [T, T] mask, T^2 work where the sequences
need the sum of t^2: 8 pairs of 300 tokens trained 6 times slower packed than padded that way
(260k-parameter Llama, one thread). Here each sequence attends to itself alone, without a mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

NAME = "prefkern_packed"
_packed: ContextVar[bool] = ContextVar("prefkern_packed", default=False)


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, d] packed, [B, H, T, d] padded
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_boundaries: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # [1, T, H, d]
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_boundaries is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = [
        sdpa_attention_forward(
            module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], None, **options
        )[0]
        for a, b in pairwise(packed_boundaries)
    ]
    return torch.cat(parts, dim=1), None


def _mask(*args: Any, **options: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    return None if _packed.get() else sdpa_mask(*args, **options)


def use(model: Any, max_length: int) -> bool:
    """Switches `model` from sdpa to this attention; False, unchanged, where that cannot work.

    Windows and chunks shorter than `max_length` need masks that this attention does not build.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config()
    if config._attn_implementation == NAME:
        return True
    limits = [
        getattr(config, name, None)
        for name in ("sliding_window", "attention_chunk_size")
        if getattr(config, "use_sliding_window", True)
    ]
    takes_options = all(
        any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
        for module in (model, model.base_model)
    )
    if (
        config._attn_implementation != "sdpa"
        or not takes_options
        or any(limit is not None and limit < max_length for limit in limits)
    ):
        return False
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    return True


def stop(model: Any) -> None:
    """Back to sdpa."""
    if model.config.get_text_config()._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


@contextmanager
def arguments(
    model: Any, position_ids: Tensor | None, attention_mask: Tensor | None
) -> Iterator[dict[str, Any]]:
    """Extra arguments for a forward of `model`; empty unless it is ours and the batch is packed."""
    ours = model.config.get_text_config()._attn_implementation == NAME
    if not ours or attention_mask is not None or position_ids is None or len(position_ids) != 1:
        yield {}
        return
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    token = _packed.set(True)
    try:
        yield {"packed_boundaries": (*starts, position_ids.shape[1])}
    finally:
        _packed.reset(token)
