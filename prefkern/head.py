"""How logits come from hidden states: the record every op takes for a model.

Shapes: N tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

from torch import Tensor, nn

from . import checks


@dataclass(frozen=True, eq=False)
class Head:
    """Weight, bias and the numbers that turn hidden states into logits.

    z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature

    Args:
        weight: `[V, D]`, any float dtype; cast tile by tile to the compute dtype.
        bias: `[V]`, added before the scale; -inf marks padded vocabulary. Default None.
        scale: Multiplier of the logits (logit_scale, 1 / logits_scaling). Default 1.
        softcap: Bound of the tanh soft cap (final_logit_softcapping), > 0. Default None (off).
        temperature: Divisor of the capped logits, > 0. Default 1.

    Raises:
        ValueError: a weight or bias that is not a float tensor, a number out of range.
    """

    weight: Tensor
    bias: Tensor | None = None
    _: KW_ONLY
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        checks.check_float("weight", self.weight)
        if self.bias is not None:
            checks.check_float("bias", self.bias)
        checks.check_logit_options(self.scale, self.softcap, self.temperature)

    def detach(self) -> Head:
        """The same head as a constant."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    @property
    def requires_grad(self) -> bool:
        """True where a gradient may reach the weight or the bias."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)


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
    return Head(checks.check_float(f"{name} (the weight [V, D])", value))
