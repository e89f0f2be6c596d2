"""How logits come from hidden states: the record every op takes for a model.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from torch import Tensor, nn

from . import checks
from .shard import Shard, is_distributed, of_distributed


@dataclass(frozen=True, eq=False)
class Head:
    """Weight, bias and the numbers that turn hidden states into logits.

    z = softcap * tanh(scale * (hidden @ weight.T + u @ B.T + bias) / softcap) / temperature

    Args:
        weight: `[V, D]`, any float dtype; cast tile by tile to the compute dtype.
        bias: `[V]`, added before the scale; -inf marks padded vocabulary. Default None.
        scale: Multiplier of the logits (logit_scale, 1 / logits_scaling). Default 1.
        softcap: Bound of the tanh soft cap (final_logit_softcapping), > 0. Default None (off).
        temperature: Divisor of the capped logits, > 0. Default 1.
        low_rank: Pairs (u, B): `u` like hidden with r columns `[N, r]` or `[B, T, r]`, `B [V, r]`
            (an adapter on the head: u = scaling * dropout(hidden) @ A.T). Added inside the tile,
            never as a copy of the weight; gradients reach both. Default none.
        shard: Where `weight` (and bias, and B) are some rows of a vocabulary that several ranks
            hold. A DTensor weight sharded by rows must say its `Shard(tokens=...)`. Default None.

    Raises:
        ValueError: a tensor that is not a float tensor, a number out of range.
    """

    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    low_rank: Sequence[tuple[Tensor, Tensor]] = ()
    shard: Shard | None = None

    def __post_init__(self) -> None:
        if is_distributed(self.weight):
            _check_pairs(self.low_rank)
            object.__setattr__(self, "shard", of_distributed(self.weight, self.shard))
            object.__setattr__(self, "weight", _local(self.weight))
            object.__setattr__(self, "bias", _local(self.bias))
            terms = tuple((u, _local(b)) for u, b in self.low_rank)
            object.__setattr__(self, "low_rank", terms)
        checks.check_float("weight", self.weight)
        if self.bias is not None:
            checks.check_float("bias", self.bias)
        checks.check_logit_options(self.scale, self.softcap, self.temperature)
        if self.low_rank != ():
            _check_pairs(self.low_rank)
        if self.shard is not None and not isinstance(self.shard, Shard):
            raise ValueError(
                f"shard must be a prefkern.Shard or None, got {type(self.shard).__name__}; it says "
                "which rows of the vocabulary this rank holds."
            )
        for u, b in self.low_rank:
            checks.check_float("low_rank: u", u)
            checks.check_float("low_rank: B", b)

    def detach(self) -> Head:
        """The same head as a constant."""
        bias = None if self.bias is None else self.bias.detach()
        terms = tuple((u.detach(), b.detach()) for u, b in self.low_rank)
        return replace(self, weight=self.weight.detach(), bias=bias, low_rank=terms)

    @property
    def requires_grad(self) -> bool:
        """True where a gradient may reach the weight, the bias or a right factor B."""
        own = [self.weight, *(b for _, b in self.low_rank)]
        own += [] if self.bias is None else [self.bias]
        return any(t.requires_grad for t in own)


def _check_pairs(low_rank: object) -> None:
    pairs = list(low_rank) if isinstance(low_rank, (list, tuple)) else None
    if pairs is None or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise ValueError(
            "low_rank must be a sequence of pairs (u, B), got "
            f"{type(low_rank).__name__ if pairs is None else [type(p).__name__ for p in pairs]}; "
            "write one pair as low_rank=((u, B),)."
        )


def _local(tensor: Any) -> Any:
    return tensor.to_local() if is_distributed(tensor) else tensor


HeadLike = Tensor | Head | nn.Linear


def as_head(value: HeadLike, name: str = "head") -> Head:
    """A tensor `[V, D]`, a Head or an nn.Linear as a Head.

    Raises:
        ValueError: anything else, with what to pass instead.
    """
    if isinstance(value, Head):
        return value
    if isinstance(value, nn.Linear):
        return Head(value.weight, value.bias)
    if isinstance(value, nn.Module):
        raise ValueError(
            f"{name} must be a weight [V, D], a prefkern.Head or an nn.Linear, got the module "
            f"{type(value).__name__}; pass Head(module.weight, ...) if its logits are hidden @ "
            "weight.T, and name scale, softcap and bias there."
        )
    if is_distributed(value):
        return Head(value)
    return Head(checks.check_float(f"{name} (the weight [V, D])", value))
