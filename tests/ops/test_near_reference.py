"""Policies close to their reference, where every run begins, and equal to it.

A divergence and its gradient are what is left of larger terms there: a forward and a backward that
form a sign, a mean or a normaliser in different arithmetic leave an error of any multiple of it.
"""

from __future__ import annotations

import functools

import baseline
import pytest
import torch
from cases import BF16, FP16, FP32, FP64, IGNORE, Inputs, Options, device_of, dtypes, field_of
from op_checks import run_op

import prefkern

DIVERGENCES = ("fkl", "rkl", "jsd:0.3", "alpha:0.4", "renyi:0.6", "tv", "bkl:3")
SINGLE = ("col", "ent")
# rows, vocabulary (two chunks on the CPU; interpreter and emulation are slow), hidden size
SIZES = dict.fromkeys(("triton", "cuda"), (6, 300, 16))
SIZE = (32, 1100, 32)
OPTIONS = (
    Options("plain"),
    Options("bias", bias="dense"),
    Options("softcap", softcap=4.0, temperature=1.3),
)
HEAD = ("hidden", "weight")
# trained: products kept or recomputed; frozen: sums of head rows formed in the forward
ways = pytest.mark.parametrize(
    ("wanted", "budget"),
    [(HEAD, None), (HEAD, 0), (("hidden",), None)],
    ids=["kept", "recomputed", "frozen"],
)
budgets = pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])


@functools.lru_cache(maxsize=64)
def near(size: tuple, distance: float, dtype: torch.dtype, option: Options = OPTIONS[0]) -> Inputs:
    """Peaked rows, like a trained model's, and a reference whose hidden states are `distance` away;
    one head for both."""
    n, v, d = size
    g = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=FP64)

    weight, targets = normal(v, d) * (2 / d**0.5), torch.randint(0, v, (n,), generator=g)
    hidden = normal(n, d) + 2 * weight[targets]
    ref = hidden + distance * normal(n, d)
    targets[1::5] = IGNORE
    bias = normal(v).to(dtype) if option.bias else None
    head = weight.to(dtype)
    return Inputs(hidden.to(dtype), head, targets, bias, ref.to(dtype), head, bias, normal(v))


def wide(inputs: Inputs) -> Inputs:
    """The same numbers in float64."""
    parts = vars(inputs).items()
    return Inputs(**{k: x.double() if k != "targets" and x is not None else x for k, x in parts})


def baseline_gradients(inputs: Inputs, stat: str) -> dict[str, torch.Tensor]:
    leaf = [x.clone().requires_grad_() for x in (inputs.hidden, inputs.weight)]
    z = baseline.head_logits(*leaf, inputs.bias)
    zr = baseline.head_logits(inputs.ref_hidden, inputs.ref_weight, inputs.ref_bias)
    values = inputs.values.to(z.dtype)
    out = baseline.token_stats(z, inputs.targets, (stat,), zr=zr, values=values)[stat]
    found = torch.autograd.grad(out.sum(), leaf)
    return {name: g.double() for name, g in zip(HEAD, found, strict=True)}


def unresolved(inputs: Inputs, unit: float) -> dict[str, torch.Tensor]:
    """What tv's gradient may be off by where the sign of p - r is beyond a logit's rounding."""
    exact = wide(inputs)
    z, zr = (h @ exact.weight.T for h in (exact.hidden, exact.ref_hidden))
    lp, lr = z.log_softmax(-1), zr.log_softmax(-1)
    p = torch.where((lp - lr).abs() <= unit * z.abs().amax(-1, keepdim=True), lp.exp(), 0.0)
    p[inputs.targets == IGNORE] = 0.0
    return {"hidden": p @ exact.weight.abs(), "weight": p.T @ exact.hidden.abs()}


@functools.lru_cache(maxsize=512)
def truth(
    size: tuple, distance: float, dtype: torch.dtype, stat: str
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """(float64 gradients, relative error allowed: twice the baseline's and a floor, what rounding
    the result alone costs)."""
    inputs = near(size, distance, dtype)
    exact = baseline_gradients(wide(inputs), stat)
    unit = torch.finfo(dtype).eps
    if dtype == FP64:  # the baseline is the oracle: rounding a logit of 30 over what is left of it
        allowed = dict.fromkeys(HEAD, unit * 30 / (1 if stat in SINGLE else distance))
    else:
        base = baseline_gradients(inputs, stat)
        allowed = {name: 2 * relative(base[name], exact[name]) + unit for name in HEAD}
    if stat == "tv":
        flips = unresolved(inputs, 2 * torch.finfo(FP64 if dtype == FP64 else FP32).eps)
        for name, x in flips.items():
            allowed[name] += (x.norm() / exact[name].norm()).item()
    return exact, allowed


def gradients(
    backend: str, inputs: Inputs, stat: str, wanted: tuple[str, ...], **arguments
) -> dict[str, torch.Tensor]:
    dtype = FP64 if inputs.hidden.dtype == FP64 else FP32
    if field_of(stat) in SINGLE:
        inputs = inputs.replace(ref_hidden=None, ref_weight=None, ref_bias=None)
    inputs = inputs.replace(values=inputs.values.to(dtype) if stat == "ev" else None)
    upstream = {stat: torch.ones(inputs.targets.numel(), dtype=dtype)}
    found = run_op(backend, inputs, (stat,), upstream, wanted=wanted, **arguments)[1]
    return {name: found[name].double() for name in wanted}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@ways
@dtypes
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("stat", DIVERGENCES + SINGLE)
def test_gradients_stay_close(backend, stat, distance, dtype, wanted, budget):
    """In the norm of the gradient, which an error of its own size cannot pass."""
    if dtype in (BF16, FP16):
        distance *= 10  # closer, most hidden states round to the reference's own
    if field_of(stat) in SINGLE and distance < 1e-2:
        pytest.skip("reads no reference")
    size = SIZES.get(backend, SIZE)
    got = gradients(backend, near(size, distance, dtype), stat, wanted, memory_budget=budget)
    exact, allowed = truth(size, distance, dtype, stat)
    for name, one in got.items():
        err, limit = relative(one, exact[name]), allowed[name]
        assert err <= limit, f"d_{name}: relative error {err:.2e}, allowed {limit:.2e}"


@ways
@pytest.mark.parametrize("distance", [0.02, 1.0], ids=["near", "far"])
@pytest.mark.parametrize("stat", ["fkl", "rkl", "jsd:0.5", "alpha:0.5", "renyi:0.5", "tv", "ev",
                                  "ent", "bkl:8", "mix:0.5"])  # fmt: skip
def test_bf16_gradients_within_one_percent(backend, stat, distance, wanted, budget):
    """Of float64 gradients from the same bf16 inputs: logits rounded to bf16 put 3 (far) to 36 %
    (near) there."""
    size = SIZES.get(backend, SIZE)
    inputs = near(size, distance, BF16)
    exact = baseline_gradients(wide(inputs), stat)
    if distance < 0.1:
        z, zr = (h.double() @ inputs.weight.double().T for h in (inputs.hidden, inputs.ref_hidden))
        kl = baseline.token_stats(z, inputs.targets, ("fkl",), zr=zr)["fkl"].max()
        assert 1e-5 < kl < 3e-3, f"the largest KL is {kl}"
    got = gradients(backend, inputs, stat, wanted, memory_budget=budget)
    for name, one in got.items():
        err = relative(one, exact[name])
        assert err < 0.01, f"d_{name}: {err:.2%}"


@pytest.mark.parametrize("wanted", [("hidden",), HEAD], ids=["frozen", "trained"])
@pytest.mark.parametrize("stat", ["ent", "fkl", "rkl"])
def test_bf16_gradients_over_a_head_whose_rows_are_alike(backend, stat, wanted):
    """Rows of a head have a part in common that a gradient of these does not see: over flat
    probabilities, sums of rows weighted by rounded numbers were 2 % off."""
    g = torch.Generator().manual_seed(1)
    rows, width, vocab = 8, 64, 1000
    hidden = torch.randn(rows, width, generator=g).bfloat16()
    weight = ((0.4 * torch.randn(vocab, width, generator=g) + 3.0) / width**0.5).bfloat16()
    noise = 0.05 * torch.randn(rows, width, generator=g)
    inputs = Inputs(
        hidden=hidden, weight=weight, targets=torch.arange(rows),
        ref_hidden=(2.0 * hidden + noise).bfloat16(), ref_weight=weight,
        values=torch.zeros(vocab, dtype=BF16),
    )  # fmt: skip
    exact = baseline_gradients(wide(inputs), stat)
    got = gradients(backend, inputs, stat, wanted)["hidden"]
    err = relative(got, exact["hidden"])
    assert err < 0.01, f"{err:.2%}"


@budgets
@dtypes
@pytest.mark.parametrize("frozen", [False, True], ids=["trained_head", "frozen_head"])
@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.why)
def test_equal_models_are_at_zero(backend, option, frozen, dtype, budget):
    """Exactly 0, value and gradient, for every divergence at once and for each alone."""
    inputs = near(SIZES.get(backend, SIZE), 0.0, dtype, option).replace(values=None)
    wanted = ("hidden",) if frozen else ("hidden", "weight")
    kept = FP64 if dtype == FP64 else FP32
    rows = inputs.targets.numel()
    for stats in (DIVERGENCES, *((s,) for s in DIVERGENCES)):
        upstream = {s: torch.linspace(0.5, 3.0, rows, dtype=kept) for s in stats}
        values, grads = run_op(
            backend, inputs, stats, upstream, option=option, wanted=wanted, memory_budget=budget
        )
        for name, x in {**values, **{f"d_{k}": g for k, g in grads.items()}}.items():
            assert bool((x == 0).all()), f"{stats}: {name} is up to {x.abs().max():.2e}"


@dtypes
@pytest.mark.parametrize("stat", DIVERGENCES)
def test_logits_against_themselves(backend, stat, dtype):
    device = device_of(backend)
    g = torch.Generator().manual_seed(2)
    n, v = (4, 300) if backend == "triton" else (8, 2100)
    z = (torch.randn(n, v, generator=g, dtype=FP64) * 5).to(dtype).to(device)
    z[0, 5] = -torch.inf
    y = torch.randint(6, v, (n,), generator=g).to(device)
    leaf = z.clone().requires_grad_()
    out = prefkern.logits_logps(leaf, y, ref_logits=z, stats=(stat,), backend=backend)
    value = getattr(out, field_of(stat))
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    assert bool((value == 0).all()) and bool((grad == 0).all()), grad.abs().max()
