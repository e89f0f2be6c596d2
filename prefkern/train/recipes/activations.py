"""Activations of a frozen model for mapo's mask, averaged over features [M, N], and their types.

Types: 0 the MLP's post-activation, 1 attention (query, key, value and its output), 2 the residual
stream after the embedding and after every block, 3 the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ... import losses
from ...integrations import hf
from ...losses.record import Loss
from ...ops.linear_stats import linear_logps
from ..config import TrainConfig
from ..providers import Micro, Provider
from ..reference import ReferenceRows

MLP, ATTENTION, RESIDUAL, LOGITS = range(4)
# Layers whose input is the MLP's post-activation, and layers whose output belongs to attention.
_MLP_INPUTS = ("down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2", "mlp.c_proj")
_ATTENTION_OUTPUTS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "c_attn", "attn.c_proj",
    "query_key_value", "attention.dense",
)  # fmt: skip


class Activations(Provider):
    """`activations` and `hook_type`, recorded while the reference's forward runs."""

    wants_reference = "the reference's hidden states"
    wants_layers = True

    @classmethod
    def wanted(cls, config: TrainConfig, records: Sequence[Loss]) -> bool:
        return any("activations" in losses.required(record) for record in records)

    def supplies(self, record: Loss) -> frozenset[str]:
        return frozenset({"activations", "hook_type"})

    @contextmanager
    def watch(self, model: hf.Model) -> Iterator[None]:
        with record(model) as self.recorder:
            yield

    def arguments(self, micro: Micro, reference: ReferenceRows) -> dict[str, Any]:
        states = reference.states
        assert states is not None and states.layers is not None
        with states.gathered() as head:
            found = linear_logps(
                states.hidden, head, micro.batch.targets, stats=("zmean",),
                backend=self.config.backend,
            )  # fmt: skip
        assert found.zmean is not None
        return self.recorder.collect(states.layers, found.zmean)


class Recorder:
    """Collects feature means while a forward runs."""

    def __init__(self) -> None:
        self.means: list[tuple[int, Tensor]] = []  # (type, [B, T])

    def add(self, kind: int, value: Tensor) -> None:
        if value.dim() != 3:  # experts see only the tokens routed to them
            raise ValueError(
                f"mapo's mask needs [batch, tokens, features], got {list(value.shape)}: "
                "mixture-of-experts layers have none per token; use sparsepo."
            )
        self.means.append((kind, value.float().mean(-1)))

    def collect(self, states: Tensor, zmean: Tensor) -> dict[str, Tensor]:
        """The loss arguments: states [L, B, T, D] after every block, zmean [B, T]."""
        for state in states:
            self.add(RESIDUAL, state)
        self.means.append((LOGITS, zmean))
        kinds = [kind for kind, _ in self.means]
        values = torch.stack([value.reshape(-1) for _, value in self.means])  # [M, N]
        return {
            "activations": values,
            "hook_type": torch.tensor(kinds, device=values.device),
        }


@contextmanager
def record(model: hf.Model) -> Iterator[Recorder]:
    """Hooks on the model's MLP and attention layers while the context is open."""
    recorder, handles, body = Recorder(), [], hf.backbone(model)
    for name, module in body.named_modules():
        if _ends(name, _MLP_INPUTS) and "attn" not in name:
            handles.append(
                module.register_forward_pre_hook(lambda _, inputs: recorder.add(MLP, inputs[0]))
            )
        elif _ends(name, _ATTENTION_OUTPUTS):
            split = 3 if name.endswith("c_attn") else 1
            handles.append(module.register_forward_hook(_attention_hook(recorder, split)))
        elif module is hf.causal_lm(model).get_input_embeddings():
            handles.append(
                module.register_forward_hook(lambda _, __, out: recorder.add(RESIDUAL, out))
            )
    if len(handles) < 3:
        raise ValueError(
            f"mapo's mask reads MLP and attention layers, and {type(body).__name__} has none "
            f"under the names known here ({', '.join((*_MLP_INPUTS, *_ATTENTION_OUTPUTS))})."
        )
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith("." + end) for end in endings)


def _attention_hook(recorder: Recorder, split: int):
    def hook(_: nn.Module, __: tuple, out: Tensor) -> None:
        for part in out.chunk(split, -1):
            recorder.add(ATTENTION, part)

    return hook
