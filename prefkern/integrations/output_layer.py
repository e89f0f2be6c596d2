"""The output embedding of a model: the modules to call through, the weight, the adapters on it.

Shapes: N tokens, D hidden size, V vocabulary, r rank of an adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..head import Head
from ..shard import Shard, is_distributed
from . import hf


class Adapter(NamedTuple):
    """One LoRA term of an output embedding: u = scaling * a(dropout(hidden)), logits += u B^T."""

    dropout: nn.Module
    a: nn.Linear
    b: nn.Linear
    scaling: float
    cast: Callable[[Tensor, torch.dtype], Tensor]  # hidden states to the adapter's dtype


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """An output embedding as PEFT left it: the modules to call through, the linear one last, and
    the active adapters on it.

    Not a named tuple: accelerate would look inside what a model returns, and move the modules.
    """

    chain: list[nn.Module]
    adapters: list[Adapter]
    options: dict[str, Any]  # scale and soft cap of the family
    rows: int | None  # of a padded vocabulary, those the model's logits keep

    @property
    def linear(self) -> Any:
        return self.chain[-1]

    @property
    def vocabulary(self) -> int:
        """Entries of the model's logits."""
        weight = self.linear.weight
        stored = int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO-3 leaves nothing of it
        return stored if self.rows is None else min(self.rows, stored)

    @property
    def parameters(self) -> list[Any]:
        """Weight, bias or None, right factors of the adapters."""
        own = [self.linear.weight, getattr(self.linear, "bias", None)]
        return own + [adapter.b.weight for adapter in self.adapters]

    def head(self, tensors: list[Any], left: list[Tensor]) -> Head:
        """The Head of `tensors`, which stand where `parameters` do, and the left factors [.., r].

        A weight that is a DTensor inside the head's own call is tensor parallel: data parallelism
        has gathered its weights by then, so the ranks score the same tokens.
        """
        weight, bias, *right = tensors
        if self.rows is not None and self.rows < weight.shape[0]:
            weight, bias = weight[: self.rows], None if bias is None else bias[: self.rows]
            right = [b[: self.rows] for b in right]
        shard = Shard(tokens="same") if is_distributed(weight) else None
        pairs = tuple(zip(left, right, strict=True))
        return Head(weight, bias, low_rank=pairs, shard=shard, **self.options)


def output_layer_of(model: Any) -> OutputLayer:
    """The output embedding of a causal model as it is at this moment.

    isinstance throughout: FSDP2 swaps a module's class, so that its type no longer lies in peft.

    Raises:
        ValueError: no output embedding; adapters whose logits are not
            hidden W^T + s drop(hidden) A^T B^T, quantised and custom heads, by name.
    """
    config = hf.text_config(model)
    scale, softcap = hf.logit_options(config)
    chain, adapters = _adapted(hf.output_layer(model))
    hf.check_linear(model, chain[-1])
    options = {"scale": scale, "softcap": softcap}
    return OutputLayer(chain, adapters, options, getattr(config, "unpadded_vocab_size", None))


def _adapted(layer: Any) -> tuple[list[nn.Module], list[Adapter]]:
    """(modules to call through, active adapters), as PEFT's own forward takes them."""
    if "peft" not in sys.modules:
        return [layer], []
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        active = layer.active_adapters
        saved = layer.modules_to_save
        off = layer.disable_adapters or not active or any(name not in saved for name in active)
        chain, adapters = _adapted(layer.original_module if off else saved[active[0]])
        return [layer, *chain], adapters
    if not isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return [layer], []
    if not isinstance(layer, lora.Linear):
        raise ValueError(
            f"{type(layer).__module__}.{type(layer).__name__} on the output embedding is not "
            "supported; use LoRA or modules_to_save there."
        )
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its own forward would
    if layer.disable_adapters or layer.merged:
        return [layer, layer.base_layer], []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return [layer, layer.base_layer], [_lora(layer, name) for name in names]


def _lora(layer: Any, name: str) -> Adapter:
    variant = getattr(layer, "lora_variant", {}).get(name)
    for what, there in (
        ("DoRA", layer.use_dora.get(name, False)),
        (f"{type(variant).__name__}", variant is not None),
        ("a LoRA bias", layer.lora_bias.get(name, False)),
        ("fan_in_fan_out", layer.fan_in_fan_out),
    ):
        if there:
            raise ValueError(
                f"adapter {name!r} on the output embedding uses {what}, which is not supported "
                "there; leave it out of target_modules or use plain LoRA."
            )
    return Adapter(
        layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name], layer.scaling[name],
        layer._cast_input_dtype,
    )  # fmt: skip


# ---- calling it with another forward -------------------------------------------------------------


@contextmanager
def replaced(module: Any, fn: Callable[..., Any]) -> Iterator[None]:
    """module(x) runs fn in place of its forward: hooks run as ever, those of accelerate's
    device_map, which stand in `forward` itself, included."""
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    own = module.__dict__.get(name)  # tensor parallelism puts one there
    setattr(module, name, fn)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


def _call(module: nn.Module, x: Tensor, fn: Callable[..., Any]) -> Any:
    with replaced(module, fn):
        return module(x)


def through(
    layer: OutputLayer, compute: Callable[[Tensor, list[Tensor]], Any], at: int = 1
) -> Callable[..., Any]:
    """A forward for chain[at - 1] that calls the rest of the chain, then the right factors of the
    adapters, each of which may be a unit of its own, and then `compute(hidden, left factors)`."""

    def base(hidden: Tensor, **options: Any) -> Any:
        refuse_mixed(options)
        left: list[Tensor] = []

        def add(rest: list[Adapter], wide: Tensor) -> Any:
            if not rest:
                return compute(hidden, left)
            adapter, *more = rest
            wide = adapter.cast(wide, adapter.a.weight.dtype)
            u = adapter.a(adapter.dropout(wide)) * adapter.scaling  # [..., r]

            def low_rank(u: Tensor) -> Any:
                left.append(u.to(hidden.dtype))
                return add(more, wide)

            return _call(adapter.b, u, low_rank)

        return add(layer.adapters, hidden)

    if at == len(layer.chain):
        return base
    next_one = layer.chain[at]

    def pass_on(hidden: Tensor, **options: Any) -> Any:
        refuse_mixed(options)
        return _call(next_one, hidden, through(layer, compute, at + 1))

    return pass_on


def refuse_mixed(options: dict[str, Any]) -> None:
    """PEFT hands over adapter_names where every row of a batch has an adapter of its own."""
    given = sorted(name for name, value in options.items() if value is not None)
    if given:
        raise ValueError(
            f"the head was called with {given}: one adapter per row of a batch is not supported."
        )
