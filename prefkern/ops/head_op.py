"""The one opaque op behind linear_logps, linear_divergence and logits_logps, with its backward.

Forward: fold -> (second sweep) -> finish; backward: pull -> unfold. What the backward may reuse are
outputs whose sizes follow from shapes and the budget, computed before dispatch.

Shapes: N tokens, M computed rows, V vocabulary, D hidden size, r rank of low-rank terms, n
statistics.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..backends import choice, frozen
from ..backends.contract import HeadCall, unpack
from ..backends.plan import Plan, read_plan
from . import scored, sharded, shared, tail, transforms

LEAVES = ("hidden", "weight", "bias", "low_in", "low_out", "logits")

_LIBRARY = torch.library.Library("prefkern", "FRAGMENT")
_RECORD = "Tensor[] tensors, float[] numbers, str plan, int ignore_index"
_LIBRARY.define(
    f"head_fwd({_RECORD}, SymInt kept, SymInt? num_scored, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "head_bwd(Tensor d_out, Tensor out, Tensor saved, Tensor cache, Tensor factors, "
    f"Tensor skipped, {_RECORD}, str needed, str backend) -> Tensor[]"
)


def _forward(
    tensors: list[Tensor],
    numbers: list[float],
    plan: str,
    ignore_index: int,
    kept: int,
    num_scored: int | None,
    backend: str,
) -> tuple[Tensor, ...]:
    """(out [n, N], saved [SAVED, M], cache [kept_models, kept, V], factors [f, M, D + r] or [0],
    skipped [tail_models, C, M] or [0]). With a tail, out has one row more: the share of units
    computed."""
    module = choice.load_backend(backend)
    if _in_one_step(module, read_plan(plan)):
        if num_scored is not None:
            _check_labels(unpack(tensors, numbers, plan, ignore_index), num_scored)
        try:
            return module.forward(tensors, numbers, plan, ignore_index, kept)
        except RuntimeError:
            _check_labels(unpack(tensors, numbers, plan, ignore_index), None)
            raise
    call = unpack(tensors, numbers, plan, ignore_index)
    _check_labels(call, num_scored)
    with shared.no_autocast(call.targets.device.type):
        if call.shard is not None:
            return sharded.forward(module, call, kept)
        if tail.is_flat(module, call):
            return _flat(module, call, kept)
        folded = module.fold(call, kept)
        second = None
        if call.plan.second:
            second = module.fold_again(call, module.arithmetic.norms(call, folded), folded.cache)
        out, saved = module.arithmetic.finish(call, folded, second)
        factors = folded.factors
        if call.plan.frozen:
            factors = frozen.normalise(call, factors, folded.sums, folded.sums)
        if call.plan.either:  # both schemes' results have one shape; nothing touches the other's
            factors = out.new_empty(_factors_shape(call))
        skipped = tail.choose(call, call, folded)
        out = tail.with_share(call, out, skipped)
        if call.rows is not None:
            out = out.new_zeros((out.shape[0], call.N)).index_copy_(1, call.rows, out)
        if call.rows is not None and num_scored is not None:
            out = scored.poison(out, call)
    return out, saved, folded.cache, factors, skipped


def _in_one_step(module: Any, plan: Plan) -> bool:
    return plan.whole and hasattr(module, "forward")


def _flat(module: Any, call: HeadCall, kept: int) -> tuple[Tensor, ...]:
    """A call with a tail by the frozen scheme, which skips nothing."""
    one_pass = call.plan.one_pass.text
    record = (*call.pack(), one_pass, call.ignore_index)
    out, saved, _, factors, _ = module.forward(*record, 0)
    cache = out.new_empty((call.kept_models, kept, call.V), dtype=call.cache_dtype)
    skipped = tail.all_formed(call)
    return tail.with_share(call, out, skipped), saved, cache, factors, skipped


def _check_labels(call: HeadCall, num_scored: int | None) -> None:
    """What must be read to be checked, where reading waits for nobody."""
    if call.targets.device.type != "cpu":
        return
    checks.check_target_range(call.targets, call.total, call.ignore_index)
    checks.check_num_scored(call.targets, call.ignore_index, num_scored)
    if call.values_index is not None:
        live = call.values_index[call.targets != call.ignore_index]
        checks.check_index_range(live, call.total)


def _backward(
    d_out: Tensor,  # [n, N]
    out: Tensor,  # [n, N]
    saved: Tensor,
    cache: Tensor,
    factors: Tensor,
    skipped: Tensor,
    tensors: list[Tensor],
    numbers: list[float],
    plan: str,
    ignore_index: int,
    needed: str,
    backend: str,
) -> list[Tensor]:
    """Gradients of the tensors that `needed` names, in its order."""
    module = choice.load_backend(backend)
    kind = read_plan(plan)
    if kind.tail > 0.0:
        d_out, out = d_out[:-1], out[:-1]  # the share has no gradient
        if kind.either and tail.is_formed(skipped):
            kind = kind.one_pass
    if _in_one_step(module, kind):
        record = (tensors, numbers, kind.text, ignore_index)
        return module.backward(
            *record, d_out.contiguous(), out.contiguous(), saved, cache, factors, needed
        )
    call = unpack(tensors, numbers, plan, ignore_index)
    names = needed.split(",")
    with shared.no_autocast(call.targets.device.type):
        if call.shard is not None:
            made = (d_out, out, saved, cache, factors, skipped)
            found = sharded.backward(module, call, *made, frozenset(names))
            return [getattr(found, name) for name in names]
        if call.rows is not None:
            d_out, out = (x.index_select(1, call.rows) for x in (d_out, out))
        coefficients = module.arithmetic.pull(call, d_out.contiguous(), out.contiguous(), saved)
        if call.plan.frozen:
            found = frozen.gradient(call, coefficients, factors, saved, frozenset(names))
        else:
            units = tail.units(call, coefficients, skipped, frozenset(names))
            found = module.unfold(call, coefficients, cache, frozenset(names), units)
    return [getattr(found, name) for name in names]


_LIBRARY.impl("head_fwd", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("head_bwd", _backward, "CompositeExplicitAutograd")


def _factors_shape(call: HeadCall) -> tuple[int, ...]:
    plan, policy = call.plan, call.policy
    if not (plan.frozen or plan.either):
        return (0,)
    assert policy.hidden is not None
    depth = policy.hidden.shape[1] + (0 if policy.low_in is None else policy.low_in.shape[1])
    m = call.M
    if call.shard is not None and call.shard.tokens != "same":
        m = call.N * call.shard.world  # equal numbers of tokens, while tracing
    return (len((plan.one_pass if plan.either else plan).factors), m, depth)


def _forward_fake(tensors, numbers, plan, ignore_index, kept, num_scored, backend):
    call = unpack(tensors, numbers, plan, ignore_index)
    like, n = call.targets, len(call.plan.stats)
    m, saved = call.M, call.plan.saved_rows
    if call.shard is not None and call.shard.tokens != "same":
        m, saved = call.N * call.shard.world, saved + n  # equal numbers of tokens, while tracing
    skipped: tuple[int, ...] = (0,)
    shares = 0
    if call.plan.tail > 0.0:
        skipped, shares = (call.plan.tail_models, call.chunks, m), 1
    return (
        like.new_empty((n + shares, call.N), dtype=call.fold_dtype),
        like.new_empty((saved, m), dtype=torch.float64),
        like.new_empty((call.kept_models, kept, call.V), dtype=call.cache_dtype),
        like.new_empty(_factors_shape(call), dtype=call.fold_dtype),
        like.new_empty(skipped, dtype=call.fold_dtype),
    )


def _backward_fake(
    d_out, out, saved, cache, factors, skipped, tensors, numbers, plan, ignore_index, needed,
    backend,
):  # fmt: skip
    call = unpack(tensors, numbers, plan, ignore_index)
    return [torch.empty_like(getattr(call.policy, name)) for name in needed.split(",")]


torch.library.register_fake("prefkern::head_fwd", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("prefkern::head_bwd", _backward_fake, lib=_LIBRARY)
for _op in ("head_fwd", "head_bwd"):
    transforms.vmap_by_loop(_op, _LIBRARY)


LEADING = 6  # arguments of _Head before its tensors


class _Head(torch.autograd.Function):
    """Statistics [n, N] of a call; first derivatives alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(numbers, plan, ignore_index, kept, num_scored, backend, *tensors):
        return torch.ops.prefkern.head_fwd(
            list(tensors), numbers, plan, ignore_index, kept, num_scored, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.record, ctx.backend, ctx.count = inputs[:3], inputs[5], len(inputs) - LEADING
        ctx.save_for_backward(*inputs[LEADING:], *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, *_: Any):
        found: list[Tensor | None] = [None] * ctx.count
        if d_out is None:
            return (None,) * LEADING + tuple(found)
        saved = ctx.saved_tensors  # once: a checkpoint region unpacks each time
        tensors, output = saved[: ctx.count], saved[ctx.count :]
        numbers, plan, ignore_index = ctx.record
        names = read_plan(plan).tensors
        at = [
            i for i in range(ctx.count) if names[i] in LEAVES and ctx.needs_input_grad[LEADING + i]
        ]  # the reference's tensors have other names, and never a gradient
        if at:
            needed = ",".join(names[i] for i in at)
            rest = (*output, list(tensors), numbers, plan, ignore_index, needed, ctx.backend)
            if transforms.is_batched(d_out):
                grads = transforms.over_batch(torch.ops.prefkern.head_bwd, d_out, *rest)
            else:
                grads = torch.ops.prefkern.head_bwd(d_out, *rest)
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                grads = list(transforms.once(grads, tensors))
            for i, grad in zip(at, grads, strict=True):
                found[i] = grad
        return (None,) * LEADING + tuple(found)


# `apply` binds its arguments by the signature of `forward`, and reading one off the function at
# every call is a fifth of what a small call costs.
_SIGNATURE = inspect.Signature([inspect.Parameter("all", inspect.Parameter.VAR_POSITIONAL)])
_Head.forward.__signature__ = _SIGNATURE  # type: ignore[attr-defined]


def head_op(
    call: HeadCall, plan: str, kept: int, num_scored: int | None, backend: str
) -> Tensor:  # [n, N]
    """The statistics of a call in the order of its plan."""
    tensors, numbers = call.pack()
    transforms.refuse_forward_mode(*tensors)
    leading = (numbers, plan, call.ignore_index, kept, num_scored, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Head.apply(*leading, *tensors)[0]
    return torch.ops.prefkern.head_fwd(tensors, *leading)[0]
