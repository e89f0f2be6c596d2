"""A frozen model beside the policy: its hidden states, and its head inside the policy's call.

Shapes: B rows of T tokens, D hidden size, V vocabulary, L blocks, r rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head import Head
from ..shard import is_distributed
from .head_view import View
from .output_layer import OutputLayer


class FrozenView(NamedTuple):
    """What `frozen_view` keeps of a frozen model's call."""

    hidden: Tensor  # [B, T, D]
    left: list[Tensor]  # [B, T, r] left factors of the adapters on its head
    source: OutputLayer
    layers: Tensor | None  # [L, B, T, D]
    parallel: bool  # tensor parallel: its ranks score the same tokens, each by its rows of the head

    @contextmanager
    def gathered(self) -> Iterator[Head]:
        """Its head as plain, constant tensors, whoever shards them; for use inside the
        policy's call. A forward that keeps its own would find its storage freed. Under tensor
        parallelism it stays as it is: this rank's rows.

        Raises:
            ValueError: a head whose weights are offloaded outside its own call.
        """
        parameters = self.source.parameters
        with ExitStack() as stack:
            _gather_zero3(stack, [p for p in parameters if hasattr(p, "ds_status")])
            if self.parallel:
                yield self.source.head(parameters, self.left).detach()
            else:
                yield self.source.head([_plain(p) for p in parameters], self.left)


def frozen_view(view: View) -> FrozenView:
    """For at_head=: what a two-model statistic needs of a reference, without gradient."""
    left = [u.detach() for u, _ in view.head.low_rank]
    layers = None if view.layers is None else view.layers.detach()
    parallel = view.head.shard is not None
    return FrozenView(view.hidden.detach(), left, view.source, layers, parallel)


def _plain(parameter: Any) -> Any:
    """A constant's whole value: no gradient comes back, so every rank may have all of it."""
    if parameter is None:
        return None
    if parameter.device.type == "meta":
        raise ValueError(
            "the reference's head is offloaded and only there during its own call; keep lm_head on "
            "the device (device_map), or use a loss that reads the reference's log-probabilities."
        )
    with torch.no_grad():
        whole = parameter.full_tensor() if is_distributed(parameter) else parameter
    return whole.detach()


def _gather_zero3(stack: ExitStack, parameters: list[Any]) -> None:
    """DeepSpeed ZeRO-3 partitions; those that are there already (tied embeddings) stay."""
    from_ds = {id(p): p for p in parameters if p.ds_status.name != "AVAILABLE"}
    if from_ds:
        import deepspeed

        stack.enter_context(deepspeed.zero.GatheredParameters(list(from_ds.values())))
