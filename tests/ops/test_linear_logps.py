"""linear_logps: values and gradients against float64, over dtypes, regimes and arguments."""

from __future__ import annotations

import pytest
import torch
from cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    IGNORE,
    MANY_ROWS,
    ONE_MODEL,
    OPTIONS,
    SMALL,
    Inputs,
    Options,
    Regime,
    differentiable,
    dtypes,
    one_model,
    options,
    regimes,
    upstream_for,
)
from closeness import assert_same_bits
from op_checks import check_closeness, check_masked_rows, run_op

import prefkern


@dtypes
@regimes
def test_regimes(backend, regime, dtype):
    check_closeness(backend, one_model(regime, dtype), ONE_MODEL)


@dtypes
@options
def test_logit_arguments(backend, option, dtype):
    check_closeness(backend, one_model(SMALL, dtype, option=option), ONE_MODEL, option=option)


@dtypes
@pytest.mark.parametrize("stat", differentiable(ONE_MODEL))
def test_each_statistic_alone(backend, stat, dtype):
    """A small gradient is not hidden behind a large one."""
    check_closeness(backend, one_model(SMALL, dtype), (stat,))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("stat", differentiable(ONE_MODEL))
def test_gradients_of_confident_16_bit_rows(backend, stat, dtype):
    """Values are folded from unrounded logits, the backward reads rounded ones.

    A normaliser that belongs to the other kind of logits leaves an error of eps |z| p in every
    logit gradient: many times the baseline's where p is near 1 and the true gradient near 0.
    """
    check_closeness(backend, one_model(MANY_ROWS, dtype, lean=2.0), (stat,))


@pytest.mark.parametrize("stat", ["logp", "lse", "zy", "ent"])
@dtypes
def test_frozen_head(backend, stat, dtype):
    """Only hidden needs a gradient: the forward forms the rows that the backward scales."""
    check_closeness(backend, one_model(SMALL, dtype), (stat,), wanted=("hidden",))


@dtypes
def test_frozen_head_with_several_statistics_and_arguments(backend, dtype):
    for option in OPTIONS:
        check_closeness(
            backend,
            one_model(SMALL, dtype, option=option),
            ("logp", "top1", "ent", "lse", "zmean"),
            option=option,
            wanted=("hidden",),
        )


@dtypes
@pytest.mark.parametrize(
    "wanted", [("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")], ids="+".join
)
def test_any_subset_of_gradients(backend, wanted, dtype):
    option = next(o for o in OPTIONS if o.bias == "dense")
    check_closeness(
        backend, one_model(SMALL, dtype, option=option), ONE_MODEL, option=option, wanted=wanted
    )


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(BF16, FP32), (FP16, FP32), (FP32, BF16), (FP32, FP64), (FP64, FP32), (BF16, FP16)],
    ids=lambda d: str(d).removeprefix("torch."),
)
def test_head_of_another_dtype(backend, dtype, weight_dtype):
    """The head is cast to hidden's dtype; its gradient comes back in its own."""
    inputs = one_model(SMALL, dtype, weight_dtype=weight_dtype)
    check_closeness(backend, inputs, ONE_MODEL)
    check_closeness(backend, inputs, ("logp",), wanted=("hidden",))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38], ids=["nan", "inf", "huge"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=["fp32", "bf16", "fp64"])
def test_ignored_rows_never_reach_the_product(backend, dtype, poison):
    check_masked_rows(
        backend, one_model(Regime("mask", N=150, V=70, D=9), dtype), ONE_MODEL, poison
    )


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7])
def test_ignore_index_may_be_a_label(backend, ignore_index):
    """A tokenizer that pads with id 0 or 7 ignores that id."""
    inputs = one_model(SMALL, FP32)
    moved = inputs.targets.clone()
    moved[inputs.targets == ignore_index] = 1
    moved[inputs.targets == IGNORE] = ignore_index
    plain = moved.clone()
    plain[moved == ignore_index] = IGNORE
    want, want_grads = run_op(
        backend,
        inputs.replace(targets=plain),
        ("logp", "ent"),
        upstream_for(("logp", "ent"), 23, FP32),
    )
    got, grads = run_op(
        backend,
        inputs.replace(targets=moved),
        ("logp", "ent"),
        upstream_for(("logp", "ent"), 23, FP32),
        ignore_index=ignore_index,
    )
    for name in want:
        assert_same_bits(got[name], want[name], name)
    for name in want_grads:
        assert_same_bits(grads[name], want_grads[name], name)


def test_every_label_ignored_gives_zero_gradients(backend):
    inputs = one_model(Regime("empty", ignored="all"), FP32)
    values, grads = run_op(backend, inputs, ("logp",), upstream_for(("logp",), 24, FP32))
    assert bool((values["logp"] == 0).all())
    assert bool((grads["hidden"] == 0).all()) and bool((grads["weight"] == 0).all())


@pytest.mark.parametrize("wanted", [("hidden", "weight"), ("hidden",)], ids=["trainable", "frozen"])
def test_no_rows_at_all(backend, wanted):
    """N = 0 is not an error of the op: empty statistics and a zero gradient of the head."""
    inputs = one_model(SMALL, FP32)
    inputs = inputs.replace(hidden=inputs.hidden[:0].clone(), targets=inputs.targets[:0].clone())
    values, grads = run_op(
        backend, inputs, ("logp", "ent"), upstream_for(("logp", "ent"), 0, FP32), wanted=wanted
    )
    assert values["logp"].shape == (0,)
    assert grads["hidden"].shape == (0, 14)
    if "weight" in wanted:
        assert bool((grads["weight"] == 0).all())


def test_padded_batch_equals_flat_rows(backend):
    """[B, T, D] gives [B, T] with the bits of the flattened call."""
    inputs = one_model(Regime("flat", N=24, V=33, D=8), FP32)
    upstream = upstream_for(("logp", "ent"), 24, FP32)
    want, want_grads = run_op(backend, inputs, ("logp", "ent"), upstream)
    hidden = inputs.hidden.reshape(4, 6, 8).clone().requires_grad_()
    got = prefkern.linear_logps(
        hidden, inputs.weight, inputs.targets.reshape(4, 6), stats=("logp", "ent"), backend=backend
    )
    assert got.logp.shape == (4, 6)
    assert_same_bits(got.logp.detach().flatten(), want["logp"])
    assert_same_bits(got.ent.detach().flatten(), want["ent"])
    weight = inputs.weight.clone().requires_grad_()
    got = prefkern.linear_logps(
        hidden, weight, inputs.targets.reshape(4, 6), stats=("logp", "ent"), backend=backend
    )
    (
        got.logp * upstream["logp"].reshape(4, 6) + got.ent * upstream["ent"].reshape(4, 6)
    ).sum().backward()
    assert_same_bits(hidden.grad.reshape(24, 8), want_grads["hidden"])
    assert_same_bits(weight.grad, want_grads["weight"])


def test_transposed_and_expanded_inputs(backend):
    """A head stored as [D, V] and a hidden state repeated by expand()."""
    inputs = one_model(SMALL, FP32)
    stored = inputs.weight.T.contiguous()
    row = inputs.hidden[:1]
    check_closeness(
        backend, inputs.replace(weight=stored.T, hidden=row.expand(23, 14)), ("logp", "ent")
    )


def test_extreme_logits_stay_finite(backend):
    """Logits of +-1e4 and rows near -1e4: a running maximum that starts at 0 would return inf."""
    inputs = one_model(SMALL, FP32)
    for shift in (-1e4, 1e4):
        shifted = inputs.replace(hidden=inputs.hidden * 300, bias=torch.full((61,), shift))
        values, grads = run_op(backend, shifted, ONE_MODEL, upstream_for(ONE_MODEL, 23, FP32))
        for name, x in {**values, **grads}.items():
            assert bool(x.isfinite().all()), f"{name} is not finite at a shift of {shift}"
    check_closeness(backend, inputs.replace(hidden=inputs.hidden * 300), ONE_MODEL)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_bad_scored_row_spoils_only_its_own_statistics(backend, value):
    """NaN or inf in a scored row is reported as NaN there, and nowhere else."""
    inputs = one_model(Regime("bad", N=20, V=40, D=8, ignored="none"), FP32)
    want, _ = run_op(backend, inputs, ("logp", "lse", "ent"), None)
    hidden = inputs.hidden.clone()
    hidden[7, 3] = value
    got, _ = run_op(backend, inputs.replace(hidden=hidden), ("logp", "lse", "ent"), None)
    others = torch.arange(20) != 7
    for name in want:
        assert not bool(got[name][7].isfinite()), (
            f"{name} of the bad row looks like a number: {got[name][7]}"
        )
        assert_same_bits(got[name][others], want[name][others], name)


@dtypes
@pytest.mark.parametrize(
    "wanted", [("hidden", "weight"), ("hidden",)], ids=["trainable", "frozen_head"]
)
def test_softcap_near_saturation_keeps_its_gradient(backend, wanted, dtype):
    """1 - tanh^2 is a difference of nearly equal numbers: formed from a capped logit that was
    rounded to 16 bits it is wrong by tens of percent, or 0."""
    option = Options("saturated", softcap=30.0)
    hidden = torch.linspace(50, 100, 200, dtype=FP64)[:, None]
    weight = torch.tensor([[1.0], [1.1], [-0.9], [0.95]], dtype=FP64)
    inputs = Inputs(hidden.to(dtype), weight.to(dtype), torch.arange(200) % 4)
    check_closeness(backend, inputs, ("zy",), option=option, wanted=wanted)
    check_closeness(backend, inputs, ("logp",), option=option, wanted=wanted)


def test_top1_breaks_ties_to_the_lower_index(backend):
    hidden = torch.ones(3, 4)
    weight = torch.zeros(6, 4)
    weight[2] = weight[4] = 1.0
    got = prefkern.linear_logps(
        hidden, weight, torch.tensor([2, 4, 0]), stats=("top1",), backend=backend
    )
    assert got.top1.tolist() == [1.0, 0.0, 0.0]


def test_top1_and_zmean_have_no_gradient(backend):
    inputs = one_model(SMALL, FP32)
    hidden = inputs.hidden.clone().requires_grad_()
    got = prefkern.linear_logps(
        hidden, inputs.weight, inputs.targets, stats=("logp", "top1", "zmean"), backend=backend
    )
    assert got.logp.requires_grad and not got.top1.requires_grad and not got.zmean.requires_grad


def test_a_label_with_minus_inf_logit(backend):
    """A target in the padded vocabulary has log-probability -inf, entropy stays finite."""
    inputs = one_model(SMALL, FP32)
    bias = torch.zeros(61)
    bias[5] = float("-inf")
    targets = torch.full((23,), 5)
    got, _ = run_op(
        backend, inputs.replace(bias=bias, targets=targets), ("logp", "ent", "zmean", "col"), None
    )
    assert bool((got["logp"] == float("-inf")).all())
    for name in ("ent", "zmean", "col"):
        assert bool(got[name].isfinite().all()), name


def test_statistics_come_in_their_own_fields_whatever_the_order(backend):
    inputs = one_model(SMALL, FP32)
    a, _ = run_op(backend, inputs, ("ent", "top1", "logp", "zmean"), None)
    b, _ = run_op(backend, inputs, ("logp", "zmean", "ent", "top1"), None)
    for name in a:
        assert_same_bits(a[name], b[name], name)
    only = prefkern.linear_logps(
        inputs.hidden, inputs.weight, inputs.targets, stats="ent", backend=backend
    )
    assert only.logp is None and only.fkl is None and only.ent is not None


def test_num_scored_changes_no_bit(backend):
    inputs = one_model(SMALL, FP32)
    upstream = upstream_for(("logp",), 23, FP32)
    want, want_grads = run_op(backend, inputs, ("logp",), upstream)
    scored = int((inputs.targets != IGNORE).sum())
    got, grads = run_op(backend, inputs, ("logp",), upstream, num_scored=scored)
    assert_same_bits(got["logp"], want["logp"])
    for name in want_grads:
        assert_same_bits(grads[name], want_grads[name], name)
