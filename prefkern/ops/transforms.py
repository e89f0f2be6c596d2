"""What torch.func and vmap need of an op, and what is refused of them: derivatives pushed forward,
and second ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_SECOND = (
    "prefkern's fused ops offer first derivatives only, and this asks for a second one; call "
    "backward without create_graph=True, or compute the loss from full logits in plain PyTorch "
    "where second derivatives are needed."
)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raises where a derivative is pushed forward (torch.func.jvp, jacfwd, dual numbers): a custom
    op would drop it, and the derivative be 0 in silence."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                "prefkern's fused ops have no forward-mode derivative (torch.func.jvp, jacfwd, "
                "dual numbers); use backward, or compute the loss from full logits in plain "
                "PyTorch where forward mode is needed."
            )


def _nothing(ctx: Any, inputs: tuple, output: Any) -> None:
    pass


def _no_second(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(_SECOND)


class _Once(torch.autograd.Function):
    """Gradients that are not to be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in tensors[:count])

    setup_context = staticmethod(_nothing)
    backward = staticmethod(_no_second)


def once(grads: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same numbers as functions of `leaves`, of which a second derivative is refused and never
    silently 0."""
    return _Once.apply(len(grads), *grads, *leaves)


def refuse_double_backward(op: str) -> None:
    """Gives the backward op `op` an autograd formula that raises, so that a second derivative is
    refused and never silently wrong."""
    torch.library.register_autograd(op, _no_second, setup_context=_nothing)


class Differentiable:
    """A custom op with its autograd formula, which torch.func transforms too.

    torch.library makes an autograd.Function of an old kind of a formula, which torch.func refuses.
    Under a transform the op is called in one of the new kind; else as it is.
    """

    def __init__(
        self,
        op: Callable[..., Any],
        backward: Callable[..., Any] = _no_second,
        setup_context: Callable[..., Any] = _nothing,
    ) -> None:
        members = {
            "generate_vmap_rule": True,
            "forward": staticmethod(lambda *args: op(*args)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        }
        self.op = op
        self.function: Any = type("Transformed", (torch.autograd.Function,), members)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not _transformed():
            return self.op(*args)
        return self.function.apply(*args)


def _transformed() -> bool:
    return torch._C._functorch.maybe_current_level() is not None


def vmap_by_loop(op: str, lib: torch.library.Library) -> None:
    """Gives an op that takes lists of tensors a batching rule: one call per entry of the batch."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        overload = getattr(torch.ops.prefkern, op)
        calls = [
            overload(*(_entry(a, d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        kind = type(calls[0])
        stacked = [torch.stack(column) for column in zip(*calls, strict=True)]
        return kind(stacked), kind([0] * len(stacked))

    torch.library.register_vmap(f"prefkern::{op}", rule, lib=lib)


def is_batched(d_out: Tensor) -> bool:
    """Whether torch.autograd.grad was called with is_grads_batched=True: its vmap is an older one
    than torch.func's, and asks no op for a rule."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(d_out)


def over_batch(op: Callable[..., list[Tensor]], d_out: Tensor, *rest: Any) -> list[Tensor]:
    """op(d, *rest) for every d of a batched d_out, batched again."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    rows = torch._remove_batch_dim(d_out, level, 1, 0)
    calls = [op(d, *rest) for d in rows]
    stacked = [torch.stack(column) for column in zip(*calls, strict=True)]
    return [torch._add_batch_dim(x, 0, level) for x in stacked]


def _entry(arg: Any, dim: Any, i: int) -> Any:
    if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
        return [_entry(a, d, i) for a, d in zip(arg, dim, strict=True)]
    return arg if dim is None else arg.select(dim, i)
