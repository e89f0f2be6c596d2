"""Runs of the head ops and the checks that every backend must pass.

A check takes the name of a backend and raises AssertionError; tests/planted_faults runs the same
checks against broken backends and demands that they fail.
"""

from __future__ import annotations

import baseline
import numpy as np
import oracles
import torch
from cases import (
    IGNORE,
    ONE_MODEL,
    PLAIN,
    TWO_MODEL,
    Inputs,
    Options,
    device_of,
    field_of,
    make_inputs,
    upstream_for,
)
from closeness import assert_no_worse, assert_same_bits, grad_floor, stat_dtype, stat_floor
from torch import Tensor

import prefkern
from prefkern import Head


def leaves(inputs: Inputs, wanted=("hidden", "weight", "bias")) -> dict[str, Tensor]:
    """Fresh leaf tensors of the policy; strides are kept."""
    made = {}
    for name in ("hidden", "weight", "bias"):
        x = getattr(inputs, name)
        if x is None:
            continue
        # clone() keeps no gaps between columns, so a strided view is detached instead
        made[name] = x.detach().requires_grad_(name in wanted)
    return made


def weighted_sum(stats: dict[str, Tensor], upstream: dict[str, Tensor]) -> Tensor:
    return sum((stats[s] * u).sum() for s, u in upstream.items())


NUMBERS = ("scale", "softcap", "temperature")


def heads(weight, bias, inputs: Inputs, numbers: dict) -> tuple[Head, Head | None]:
    """The policy's head, and the reference's with the same numbers (None for one model)."""
    ref = None
    if inputs.ref_hidden is not None:
        ref = Head(inputs.ref_weight, inputs.ref_bias, **numbers)
    return Head(weight, bias, **numbers), ref


def run_op(
    backend: str,
    inputs: Inputs,
    stats,
    upstream: dict[str, Tensor] | None,
    *,
    option: Options = PLAIN,
    wanted=("hidden", "weight", "bias"),
    **arguments,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values {stat: [N]} and gradients {name: tensor} of the public op through autograd, on the
    device where the backend is tested, brought back to the CPU."""
    device = device_of(backend)
    inputs = inputs.to(device)
    leaf = leaves(inputs, wanted if upstream else ())
    head, ref_head = heads(leaf["weight"], leaf.get("bias"), inputs, option.numbers())
    arguments |= {"stats": tuple(stats), "backend": backend}
    if ref_head is None:
        result = prefkern.linear_logps(leaf["hidden"], head, inputs.targets, **arguments)
    else:
        if "ev" in stats:
            arguments["values"] = inputs.values
        result = prefkern.linear_divergence(
            leaf["hidden"], head, inputs.targets, inputs.ref_hidden, ref_head, **arguments
        )
    values = {s: getattr(result, field_of(s)) for s in stats}
    grads = {}
    if upstream:
        weighted_sum(values, {s: u.to(device) for s, u in upstream.items()}).backward()
        for name in wanted:
            if name in leaf:
                grad = leaf[name].grad
                grads[name] = grad if grad is None else grad.cpu()
                leaf[name].grad = None
    return {s: v.detach().cpu() for s, v in values.items()}, grads


def run_baseline(inputs: Inputs, stats, upstream, option: Options = PLAIN):
    """The same numbers from plain PyTorch in the same dtypes."""
    leaf = leaves(inputs)
    z = baseline.head_logits(leaf["hidden"], leaf["weight"], leaf.get("bias"), **option.numbers())
    zr = None
    if inputs.ref_hidden is not None:
        zr = baseline.head_logits(
            inputs.ref_hidden, inputs.ref_weight, inputs.ref_bias, **option.numbers()
        )
    values = baseline.token_stats(z, inputs.targets, stats, zr=zr, values=inputs.values)
    grads = {}
    if upstream:
        total = weighted_sum(values, upstream)
        names = list(leaf)
        found = torch.autograd.grad(total, [leaf[n] for n in names], allow_unused=True)
        grads = {
            n: torch.zeros_like(leaf[n]) if g is None else g
            for n, g in zip(names, found, strict=True)
        }
    return {s: v.detach() for s, v in values.items()}, grads


def run_oracle(inputs: Inputs, stats, upstream, option: Options = PLAIN) -> oracles.Truth:
    zr = rank_by = None
    if inputs.ref_hidden is not None:
        zr, _ = oracles.head_logits(
            inputs.ref_hidden, inputs.ref_weight, inputs.ref_bias, **option.numbers()
        )
        # bkl's top-k is of the reference's logits in the fold dtype
        rank_by = torch.from_numpy(zr).to(stat_dtype(inputs.hidden.dtype)).double().numpy()
    return oracles.head_stats(
        inputs.hidden,
        inputs.weight,
        inputs.targets.numpy(),
        stats,
        upstream,
        bias=inputs.bias,
        ref_logits=zr,
        rank_by=rank_by,
        values=None if inputs.values is None else oracles.as_f64(inputs.values),
        **option.numbers(),
    )


def largest(logits: np.ndarray) -> float:
    live = np.abs(logits[np.isfinite(logits)])
    return float(live.max()) if live.size else 1.0


def check_closeness(
    backend: str,
    inputs: Inputs,
    stats,
    *,
    option: Options = PLAIN,
    wanted=("hidden", "weight", "bias"),
    **arguments,
) -> None:
    """Three-way closeness of every statistic and every gradient; shapes, dtypes, exact zeros."""
    dtype = inputs.hidden.dtype
    upstream = upstream_for(stats, inputs.targets.numel(), dtype)
    got, grads = run_op(backend, inputs, stats, upstream, option=option, wanted=wanted, **arguments)
    base, base_grads = run_baseline(inputs, stats, upstream, option)
    truth = run_oracle(inputs, stats, upstream, option)
    ignored = inputs.targets == IGNORE
    size = largest(truth.logits)
    for stat in stats:
        value = got[stat]
        assert value.shape == inputs.targets.shape, f"{stat}: shape {tuple(value.shape)}"
        assert value.dtype == stat_dtype(dtype), f"{stat}: {value.dtype} for {dtype} hidden"
        assert bool((value[ignored] == 0).all()), f"{stat}: an ignored row is not exactly 0"
        if stat == "top1":
            check_top1(value, truth, inputs, dtype)
            continue
        assert_no_worse(
            value, base[stat], truth.values[stat], floor=stat_floor(stat, dtype, size), what=stat
        )
    for name in wanted:
        x = getattr(inputs, name)
        if x is None:
            continue
        grad = grads[name]
        assert grad is not None, f"d_{name} is missing"
        assert grad.dtype == x.dtype and grad.shape == x.shape, (
            f"d_{name}: {grad.dtype} {tuple(grad.shape)}"
        )
        assert_no_worse(
            grad,
            base_grads[name],
            truth.grads[name],
            floor=grad_floor(rounded_in(dtype, x.dtype), size, truth, name),
            what=f"d_{name}",
        )
    if "hidden" in wanted:
        assert bool((grads["hidden"][ignored] == 0).all()), (
            "d_hidden of an ignored row is not exactly 0"
        )


def rounded_in(compute: torch.dtype, result: torch.dtype) -> torch.dtype:
    """The coarser of two dtypes: dz is rounded to the first, the gradient to the second."""
    return max((compute, result), key=lambda d: torch.finfo(d).eps)


def check_top1(value: Tensor, truth: oracles.Truth, inputs: Inputs, dtype: torch.dtype) -> None:
    """Exactly the oracle's wherever rounding cannot swap the two largest logits."""
    keep = (inputs.targets != IGNORE).nonzero()[:, 0].numpy()
    logits = truth.logits
    unit = torch.finfo(dtype).eps * 2
    for row, i in enumerate(keep):
        order = np.sort(logits[row])
        clear = order.size == 1 or order[-1] - order[-2] > unit * max(1.0, abs(order[-1]))
        got = float(value[int(i)])
        assert got in (0.0, 1.0), f"top1 must be 0 or 1, got {got} at {i}"
        if clear:
            assert got == truth.values["top1"][i], (
                f"top1: row {i} got {got}, oracle {truth.values['top1'][i]}"
            )


def check_masked_rows(backend: str, inputs: Inputs, stats, poison: float) -> None:
    """Rows to ignore hold `poison`; everything equals, bit for bit, the call without these rows."""
    dtype = inputs.hidden.dtype
    keep = inputs.targets != IGNORE
    assert bool(keep.any()) and not bool(keep.all()), "the case must have both kinds of rows"
    hidden = inputs.hidden.clone()
    hidden[~keep] = poison
    dirty = inputs.replace(hidden=hidden)
    if inputs.ref_hidden is not None:
        ref_hidden = inputs.ref_hidden.clone()
        ref_hidden[~keep] = poison
        dirty = dirty.replace(ref_hidden=ref_hidden)
    upstream = upstream_for(stats, inputs.targets.numel(), dtype)
    loud = {s: torch.where(keep, u, torch.full_like(u, float("nan"))) for s, u in upstream.items()}
    got, grads = run_op(backend, dirty, stats, loud)
    alone = inputs.replace(hidden=inputs.hidden[keep], targets=inputs.targets[keep])
    if inputs.ref_hidden is not None:
        alone = alone.replace(ref_hidden=inputs.ref_hidden[keep])
    want, want_grads = run_op(backend, alone, stats, {s: u[keep] for s, u in upstream.items()})
    for stat in stats:
        assert bool((got[stat][~keep] == 0).all()), f"{stat}: an ignored row is not exactly 0"
        assert_same_bits(got[stat][keep], want[stat], f"{stat} of the scored rows")
    assert bool((grads["hidden"][~keep] == 0).all()), "d_hidden of an ignored row is not exactly 0"
    assert_same_bits(grads["hidden"][keep], want_grads["hidden"], "d_hidden of the scored rows")
    assert_same_bits(grads["weight"], want_grads["weight"], "d_weight")


# the two head ops behind one signature


def stats_of(op):
    return ONE_MODEL if op == "linear_logps" else TWO_MODEL


def inputs_of(op, regime, dtype, **arguments):
    inputs = make_inputs(regime, dtype, **arguments)
    if op == "linear_divergence":
        return inputs
    return inputs.replace(ref_hidden=None, ref_weight=None, ref_bias=None, values=None)


def call(op, backend, inputs, hidden, weight, stats, bias=None, **arguments):
    """The public op as a dict {stat: [N]} of live tensors; the numbers of the logits are for both
    models, and the reference of a policy without a bias has none."""
    numbers = {k: arguments.pop(k) for k in NUMBERS if k in arguments}
    if bias is None:
        inputs = inputs.replace(ref_bias=None)
    head, ref_head = heads(weight, bias, inputs, numbers)
    arguments |= {"stats": stats, "backend": backend}
    if op == "linear_logps":
        out = prefkern.linear_logps(hidden, head, inputs.targets, **arguments)
    else:
        if "ev" in stats:
            arguments["values"] = inputs.values
        out = prefkern.linear_divergence(
            hidden, head, inputs.targets, inputs.ref_hidden, ref_head, **arguments
        )
    return {s: getattr(out, field_of(s)) for s in stats}


def assert_same_run(got, want, what):
    for a, b, kind in zip(got, want, ("value", "gradient"), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert_same_bits(a[name], b[name], f"{what}: {kind} of {name}")
