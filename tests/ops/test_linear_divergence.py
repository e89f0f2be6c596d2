"""linear_divergence: policy against reference, values and policy gradients against float64."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    IGNORE,
    MANY_ROWS,
    OPTIONS,
    SMALL,
    TWO_MODEL,
    Regime,
    differentiable,
    dtypes,
    field_of,
    make_inputs,
    options,
    regimes,
)
from closeness import assert_no_worse, assert_same_bits, stat_dtype
from op_checks import check_closeness, check_masked_rows, run_op

import prefkern
from prefkern import Head


@dtypes
@regimes
def test_regimes(backend, regime, dtype):
    check_closeness(backend, make_inputs(regime, dtype), TWO_MODEL)


@dtypes
@regimes
def test_regimes_of_a_tdpo_step(backend, regime, dtype):
    """The statistics that one sweep must serve, with one head for both models."""
    check_closeness(backend, make_inputs(regime, dtype, shared=True), ("logp", "ref_logp", "fkl"))


@dtypes
@options
def test_logit_arguments(backend, option, dtype):
    check_closeness(backend, make_inputs(SMALL, dtype, option=option), TWO_MODEL, option=option)


@dtypes
@pytest.mark.parametrize("shared", [False, True], ids=["own_head", "shared_head"])
@pytest.mark.parametrize("stat", differentiable(TWO_MODEL))
def test_each_statistic_alone(backend, stat, shared, dtype):
    check_closeness(backend, make_inputs(SMALL, dtype, shared=shared), (stat,))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("stat", differentiable(TWO_MODEL))
def test_gradients_of_confident_16_bit_rows(backend, stat, dtype):
    """Values are folded from unrounded logits, the backward reads rounded ones.

    A normaliser that belongs to the other kind of logits leaves an error of eps |z| p in every
    logit gradient: many times the baseline's where p is near 1 and the true gradient near 0.
    """
    check_closeness(backend, make_inputs(MANY_ROWS, dtype, shared=True, lean=2.0), (stat,))


@dtypes
@pytest.mark.parametrize(
    "stats", [("logp", "fkl"), ("rkl",), ("logp", "rkl", "ref_logp", "fkl")], ids=",".join
)
def test_frozen_head(backend, stats, dtype):
    check_closeness(backend, make_inputs(SMALL, dtype), stats, wanted=("hidden",))
    for option in (OPTIONS[1], OPTIONS[-1]):
        check_closeness(
            backend,
            make_inputs(SMALL, dtype, option=option),
            stats,
            option=option,
            wanted=("hidden",),
        )


@dtypes
@pytest.mark.parametrize("stats", [("jsd:0.5", "tv"), ("alpha:0.5",), ("ev", "logp")], ids=",".join)
def test_frozen_head_of_statistics_without_a_row(backend, stats, dtype):
    check_closeness(backend, make_inputs(SMALL, dtype), stats, wanted=("hidden",))


@dtypes
@pytest.mark.parametrize("wanted", [("weight",), ("bias",), ("hidden", "bias")], ids="+".join)
def test_any_subset_of_gradients(backend, wanted, dtype):
    inputs = make_inputs(SMALL, dtype, option=OPTIONS[0])
    check_closeness(backend, inputs, TWO_MODEL, option=OPTIONS[0], wanted=wanted)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(BF16, FP32), (FP16, FP32), (FP32, BF16), (FP64, FP32)],
    ids=lambda d: str(d).removeprefix("torch."),
)
def test_head_of_another_dtype(backend, dtype, weight_dtype):
    check_closeness(backend, make_inputs(SMALL, dtype, weight_dtype=weight_dtype), TWO_MODEL)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=["fp32", "bf16", "fp64"])
def test_ignored_rows_never_reach_the_product(backend, dtype, poison):
    """Neither the policy's nor the reference's state of an ignored row is looked at."""
    inputs = make_inputs(Regime("mask", N=150, V=70, D=9), dtype)
    check_masked_rows(backend, inputs, TWO_MODEL, poison)


def test_each_head_has_its_own_numbers(backend):
    """Without ref_head the reference is the policy's head, numbers included; with one, its own."""
    inputs = make_inputs(SMALL, FP64)
    policy = {"scale": 1.2, "softcap": 4.0, "temperature": 1.4}
    own = {"scale": 0.6, "softcap": 7.0, "temperature": 0.9}
    plain = {"scale": 1.0, "softcap": None, "temperature": 1.0}
    head = Head(inputs.weight, **policy)
    for weight, chosen, ref_head in (
        (inputs.weight, policy, None),
        (inputs.ref_weight, own, Head(inputs.ref_weight, **own)),
        (inputs.ref_weight, plain, inputs.ref_weight),
    ):
        ref_hidden = inputs.hidden.flip(0) if ref_head is None else inputs.ref_hidden
        ref_hidden = torch.where(ref_hidden.isnan(), 0.5, ref_hidden)
        got = prefkern.linear_divergence(
            inputs.hidden, head, inputs.targets, ref_hidden, ref_head,
            stats=("logp", "ref_logp", "fkl", "jsd:0.5"), backend=backend,
        )  # fmt: skip
        zr, _ = oracles.head_logits(ref_hidden, weight, None, **chosen)
        want = oracles.head_stats(
            inputs.hidden,
            inputs.weight,
            inputs.targets.numpy(),
            ("logp", "ref_logp", "fkl", "jsd:0.5"),
            ref_logits=zr,
            **policy,
        )
        for stat, value in want.values.items():
            assert_no_worse(getattr(got, field_of(stat)), value, value, floor=1e-12, what=stat)


def test_reference_weight_none_means_the_same_head(backend):
    inputs = make_inputs(SMALL, FP32, shared=True)
    stats = ("logp", "ref_logp", "fkl", "jsd:0.5")
    a = prefkern.linear_divergence(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.ref_hidden,
        stats=stats,
        backend=backend,
    )
    b = prefkern.linear_divergence(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.ref_hidden,
        inputs.weight.clone(),
        stats=stats,
        backend=backend,
    )
    for stat in stats:
        assert_same_bits(getattr(a, field_of(stat)), getattr(b, field_of(stat)), stat)


def test_shared_head_gets_no_gradient_from_the_reference(backend):
    """d_weight of a head that serves both models is the policy's part alone."""
    inputs = make_inputs(SMALL, FP64, shared=True)
    check_closeness(backend, inputs, ("fkl", "rkl", "jsd:0.5", "mix:0.5"))
    check_closeness(backend, inputs, ("mix:-1.5",))
    weight = inputs.weight.clone().requires_grad_()
    out = prefkern.linear_divergence(
        inputs.hidden, weight, inputs.targets, inputs.ref_hidden, stats=("fkl",), backend=backend
    )
    out.fkl.sum().backward()
    ones = {"fkl": torch.ones(23, dtype=FP64)}
    zr, _ = oracles.head_logits(inputs.ref_hidden, inputs.weight)
    truth = oracles.head_stats(
        inputs.hidden, inputs.weight, inputs.targets.numpy(), ("fkl",), ones, ref_logits=zr
    )
    assert_no_worse(
        weight.grad, truth.grads["weight"], truth.grads["weight"], floor=1e-12, what="d_weight"
    )


@dtypes
@pytest.mark.parametrize("clone", [False, True], ids=["same_tensors", "equal_tensors"])
def test_equal_models_give_exact_zeros(backend, clone, dtype):
    """At step 0 every log-ratio and divergence is exactly 0, the KLs' gradients to rounding."""
    inputs = make_inputs(Regime("equal", N=33, V=131, D=24), dtype, shared=True)
    ref_hidden = inputs.hidden.clone() if clone else inputs.hidden
    ref_weight = inputs.weight.clone() if clone else None
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    stats = ("logp", "ref_logp", "fkl", "rkl", "jsd:0.3", "tv", "bkl:5", "alpha:0.4", "renyi:0.6")
    for frozen in (False, True):
        out = prefkern.linear_divergence(
            hidden,
            weight.detach() if frozen else weight,
            inputs.targets,
            ref_hidden,
            ref_weight,
            stats=stats[:4] if frozen else stats,
            backend=backend,
        )
        assert bool((out.logp == out.ref_logp).all())
        for name in ("fkl", "rkl", "jsd", "tv", "bkl", "alpha", "renyi"):
            value = getattr(out, name)
            assert value is None or bool((value == 0).all()), (
                f"{name}: {value.abs().max().item():.3e}"
            )
        for name in ("fkl", "rkl"):
            grads = torch.autograd.grad(
                getattr(out, name).sum(),
                (hidden,) if frozen else (hidden, weight),
                retain_graph=True,
            )
            # p - r and lp - lr cancel exactly; what is left may come from contracting a product and
            # a sum into one rounding, so a few units in the last place of p times the head
            limit = (
                8 * torch.finfo(stat_dtype(dtype)).eps * max(1.0, inputs.weight.abs().max().item())
            )
            for grad in grads:
                worst = grad.abs().max().item()
                assert worst <= limit, f"gradient of {name}: {worst:.3e}, allowed {limit:.1e}"


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shared", [False, True], ids=["own_head", "shared_head"])
def test_tiny_divergences_are_not_biased(backend, shared, dtype):
    """True KL about 1e-4 nats from 16-bit inputs: the mean is right to 5 %.

    Folding logits rounded to bf16 biases it by tens of percent, always upwards, so averaging over
    tokens does not help.
    """
    g = torch.Generator().manual_seed(3)
    n, v, d = 256, 1000, 64
    weight = (torch.randn(v, d, generator=g) * (3 / d**0.5)).to(dtype)
    hidden = torch.randn(n, d, generator=g).to(dtype)
    # a KL is about half the variance of the logit difference under p
    noise = 0.004 if shared else 0.003
    ref_hidden = (hidden.float() + noise * torch.randn(n, d, generator=g)).to(dtype)
    ref_weight = (
        weight if shared else (weight.float() + 0.001 * torch.randn(v, d, generator=g)).to(dtype)
    )
    targets = torch.randint(0, v, (n,), generator=g)
    stats = ("fkl", "rkl", "jsd:0.5", "alpha:0.5", "renyi:0.5", "bkl:50", "tv")
    out = prefkern.linear_divergence(
        hidden, weight, targets, ref_hidden, ref_weight, stats=stats, backend=backend
    )
    zr, _ = oracles.head_logits(ref_hidden, ref_weight)
    truth = oracles.head_stats(hidden, weight, targets.numpy(), stats, ref_logits=zr).values
    assert 3e-5 < truth["fkl"].mean() < 3e-4, f"the case drifted: KL {truth['fkl'].mean():.2e}"
    for stat in stats:
        bias = getattr(out, field_of(stat)).double().mean().item() / truth[stat].mean() - 1
        assert abs(bias) < 0.05, (
            f"{stat}: mean off by {100 * bias:+.1f} %, true mean {truth[stat].mean():.2e}"
        )


def test_entropy_of_16_bit_inputs_is_not_biased(backend):
    """Peaked rows whose entropy is about 1e-3 nats."""
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(500, 48, generator=g).bfloat16()
    targets = torch.randint(0, 500, (128,), generator=g)
    hidden = (0.25 * weight[targets].float() + 0.1 * torch.randn(128, 48, generator=g)).bfloat16()
    got = prefkern.linear_logps(hidden, weight, targets, stats=("ent",), backend=backend).ent
    want = oracles.head_stats(hidden, weight, targets.numpy(), ("ent",)).values["ent"]
    assert got.double().mean().item() == pytest.approx(want.mean(), rel=1e-3)


def test_minus_inf_in_one_model_only(backend):
    """0 * anything = 0: an entry dead in the reference costs nothing in KL(ref || policy), one dead
    in the policy nothing in KL(policy || ref)."""
    inputs = make_inputs(SMALL, FP64)
    dead = torch.zeros(61, dtype=FP64)
    dead[[3, 60]] = float("-inf")
    targets = torch.where((inputs.targets == 3) | (inputs.targets == 60), 1, inputs.targets)
    both = inputs.replace(targets=targets)
    dead_ref = both.replace(bias=torch.zeros(61, dtype=FP64), ref_bias=dead)
    check_closeness(
        backend,
        dead_ref,
        ("logp", "fkl", "jsd:0.5", "tv", "alpha:0.5", "renyi:0.5", "bkl:3", "mix:0.5"),
    )
    dead_policy = both.replace(bias=dead, ref_bias=torch.zeros(61, dtype=FP64))
    check_closeness(
        backend, dead_policy, ("logp", "rkl", "jsd:0.5", "tv", "alpha:0.5", "renyi:0.5", "mix:0.5")
    )
    # Away from the reference its zeros count the other way: fine where the policy's are too.
    check_closeness(backend, dead_policy, ("mix:-0.5",))
    check_closeness(backend, both.replace(bias=dead, ref_bias=dead), ("mix:-0.5",))
    got, _ = run_op(backend, dead_ref, ("mix:-0.5",), None)
    assert bool(got["mix:-0.5"][targets != IGNORE].isnan().all()), "no sum of p^1.5 / r^0.5 exists"
    for inputs_, stat in ((dead_ref, "rkl"), (dead_policy, "fkl")):
        got, _ = run_op(backend, inputs_, (stat,), None)
        scored = targets != IGNORE
        assert bool((got[stat][scored] == math.inf).all()), (
            f"{stat} must be +inf where mass meets p = 0"
        )


@pytest.mark.parametrize("k", [1, 2, 60, 61, 62, 5000])
def test_bucketed_kl_of_any_k(backend, k):
    """k at and beyond the vocabulary: the rest bucket is empty and bkl is fkl."""
    check_closeness(backend, make_inputs(SMALL, FP64), (f"bkl:{k}",))
    check_closeness(backend, make_inputs(SMALL, FP32), (f"bkl:{k}", "fkl"))


def test_bucketed_kl_breaks_ties_to_the_lower_index(backend):
    """Four reference logits tie for two places: indices 1 and 3 are in, 4 and 6 are not."""
    zr = torch.tensor([[0.0, 1.0, 0.5, 1.0, 1.0, -1.0, 1.0]], dtype=FP64)
    z = torch.tensor([[0.3, 1.1, -0.5, 0.2, -1.0, 0.4, 2.0]], dtype=FP64)
    eye = torch.eye(7, dtype=FP64)
    got = prefkern.linear_divergence(
        z, eye, torch.tensor([0]), zr, eye, stats=("bkl:2",), backend=backend
    )
    want, _ = oracles.row_statistic("bkl:2", z[0].numpy(), 0, zr[0].numpy())
    assert got.bkl.item() == pytest.approx(want, abs=1e-14)


def test_padded_batch_equals_flat_rows(backend):
    inputs = make_inputs(Regime("flat", N=24, V=33, D=8), FP32)
    stats = ("logp", "fkl", "jsd:0.5")
    want, _ = run_op(backend, inputs, stats, None)
    got = prefkern.linear_divergence(
        inputs.hidden.reshape(4, 6, 8),
        inputs.weight,
        inputs.targets.reshape(4, 6),
        inputs.ref_hidden.reshape(4, 6, 11),
        inputs.ref_weight,
        stats=stats,
        backend=backend,
    )
    for stat in stats:
        value = getattr(got, field_of(stat))
        assert value.shape == (4, 6)
        assert_same_bits(value.flatten(), want[stat], stat)


def test_logp_is_the_one_of_linear_logps(backend):
    """Asking for a divergence beside logp moves logp by rounding only, and ref_logp is a logp."""
    inputs = make_inputs(SMALL, FP32)
    both, _ = run_op(backend, inputs, ("logp", "ref_logp", "ref_lse", "fkl"), None)
    alone = prefkern.linear_logps(
        inputs.hidden, inputs.weight, inputs.targets, backend=backend
    ).logp
    ref = prefkern.linear_logps(
        inputs.ref_hidden, inputs.ref_weight, inputs.targets, stats=("logp", "lse"), backend=backend
    )
    torch.testing.assert_close(both["logp"], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(both["ref_logp"], ref.logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(both["ref_lse"], ref.lse, rtol=0, atol=1e-5)


def test_reference_statistics_are_constants(backend):
    inputs = make_inputs(SMALL, FP32)
    hidden = inputs.hidden.clone().requires_grad_()
    out = prefkern.linear_divergence(
        hidden,
        inputs.weight,
        inputs.targets,
        inputs.ref_hidden,
        inputs.ref_weight,
        stats=("logp", "ref_logp", "ref_lse"),
        backend=backend,
    )
    assert (
        out.logp.requires_grad and not out.ref_logp.requires_grad and not out.ref_lse.requires_grad
    )


def test_parameters_are_used_in_full(backend):
    """Seven digits of a parameter matter: jsd:0.1234567 is not jsd:0.123457."""
    inputs = make_inputs(SMALL, FP64)
    for stat in ("jsd:0.1234567", "alpha:0.3333333333", "renyi:0.9999999", "mix:0.1234567"):
        got, _ = run_op(backend, inputs, (stat,), None)
        zr, _ = oracles.head_logits(inputs.ref_hidden, inputs.ref_weight)
        want = oracles.head_stats(
            inputs.hidden, inputs.weight, inputs.targets.numpy(), (stat,), ref_logits=zr
        ).values[stat]
        # 1 - a = 1e-7 amplifies rounding by 1e7 in renyi
        floor = 1e-7 if stat.startswith("renyi") else 1e-12
        assert_no_worse(got[stat], want, want, floor=floor, what=stat)
