"""logits_logps and selective_log_softmax: statistics where logits already exist."""

from __future__ import annotations

import baseline
import oracles
import pytest
import torch
from cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    IGNORE,
    ONE_MODEL,
    TWO_MODEL,
    differentiable,
    dtypes,
    field_of,
    make_targets,
    spread,
)
from closeness import ROUNDINGS, assert_no_worse, assert_same_bits, eps, stat_dtype, stat_floor

import prefkern

PAIRWISE = tuple(s for s in TWO_MODEL if s != "ev")
SHAPES = {
    "aligned": (32, 128, "none"),
    "ragged": (37, 131, "some"),
    "one_row": (1, 64, "none"),
    "V_is_1": (5, 1, "some"),
    "wide_rows": (3, 32003, "none"),
    "many_rows": (1500, 7, "some"),
    "all_ignored": (8, 20, "all"),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def make(shape, dtype, strided=False):
    n, v, ignored = shape
    g = torch.Generator().manual_seed(n + 31 * v)
    logits, ref = (2 * torch.randn(n, v, generator=g, dtype=FP64) for _ in range(2))
    logits, ref = logits.to(dtype), ref.to(dtype)
    return spread(logits) if strided else logits, ref, make_targets(g, n, v, ignored)


def check(backend, logits, targets, ref, stats, temperature=1.0):
    """Three-way closeness of values and d_logits."""
    dtype, n = logits.dtype, targets.numel()
    g = torch.Generator().manual_seed(n)
    upstream = {
        s: torch.randn(n, generator=g, dtype=FP64).to(stat_dtype(dtype))
        for s in differentiable(stats)
    }
    leaf = logits.detach().requires_grad_()
    out = prefkern.logits_logps(
        leaf, targets, ref_logits=ref, temperature=temperature, stats=stats, backend=backend
    )
    got = {s: getattr(out, field_of(s)) for s in stats}
    sum((got[s] * u).sum() for s, u in upstream.items()).backward()
    grad, leaf.grad = leaf.grad, None
    base_z = baseline.wide(leaf) / temperature
    base = baseline.token_stats(
        base_z, targets, stats, zr=None if ref is None else baseline.wide(ref) / temperature
    )
    (base_grad,) = torch.autograd.grad(sum((base[s] * u).sum() for s, u in upstream.items()), leaf)
    zr = None if ref is None else oracles.as_f64(ref) / temperature
    want, dz, _ = oracles.token_stats(
        oracles.as_f64(logits) / temperature, targets.numpy(), stats, zr=zr, upstream=upstream
    )
    size = float(logits[logits.isfinite()].abs().max()) / temperature
    # the logits are given, so nothing is rounded to 16 bits before the fold: float32 floors
    wide = stat_dtype(dtype)
    for stat in stats:
        assert got[stat].dtype == wide and got[stat].shape == targets.shape
        if stat == "top1":
            assert got[stat].double().tolist() == want[stat].tolist()
            continue
        assert_no_worse(
            got[stat].detach(),
            base[stat].detach(),
            want[stat],
            floor=stat_floor(stat, wide, size),
            what=stat,
        )
    assert grad.dtype == dtype
    # dz is a sum of terms of the size of the upstream numbers, rounded once to the logits' dtype
    largest = sum(abs(u).max().item() for u in upstream.values())
    unit = ROUNDINGS * eps(wide) * max(1.0, size) * largest / temperature
    if dtype in (BF16, FP16):
        unit += eps(dtype) * float(abs(dz).max() / temperature) + torch.finfo(dtype).tiny
    assert_no_worse(grad, base_grad, dz / temperature, floor=unit, what="d_logits")
    assert bool((grad[targets == IGNORE] == 0).all()), "d_logits of an ignored row is not exactly 0"


@dtypes
@shapes
def test_one_model(backend, shape, dtype):
    logits, _, targets = make(shape, dtype)
    check(backend, logits, targets, None, ONE_MODEL)


@dtypes
@shapes
def test_two_models(backend, shape, dtype):
    logits, ref, targets = make(shape, dtype)
    check(backend, logits, targets, ref, PAIRWISE)


@dtypes
@pytest.mark.parametrize("temperature", [0.6, 2.5])
def test_temperature_divides_both_models(backend, temperature, dtype):
    logits, ref, targets = make(SHAPES["ragged"], dtype)
    check(
        backend,
        logits,
        targets,
        ref,
        ("logp", "lse", "ent", "fkl", "jsd:0.5", "ref_logp"),
        temperature,
    )


def test_strided_logits(backend):
    logits, ref, targets = make(SHAPES["ragged"], FP32, strided=True)
    assert not logits.is_contiguous()
    check(backend, logits, targets, ref, ("logp", "ent", "fkl"))


@dtypes
def test_padded_vocabulary(backend, dtype):
    logits, ref, targets = make((20, 50, "some"), dtype)
    logits[:, 40:] = float("-inf")
    ref[:, 40:] = float("-inf")
    targets = torch.where(targets >= 40, 3, targets)
    check(backend, logits, targets, ref, (*PAIRWISE, "ent", "lse", "zmean", "col", "top1"))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_ignored_rows_are_not_looked_at(backend, poison):
    logits, ref, targets = make((30, 20, "some"), FP32)
    keep = targets != IGNORE
    clean = prefkern.logits_logps(logits, targets, ref_logits=ref, stats=PAIRWISE, backend=backend)
    for x in (logits, ref):
        x[~keep] = poison
    leaf = logits.clone().requires_grad_()
    out = prefkern.logits_logps(leaf, targets, ref_logits=ref, stats=PAIRWISE, backend=backend)
    for stat in PAIRWISE:
        assert_same_bits(
            getattr(out, field_of(stat)).detach(), getattr(clean, field_of(stat)), stat
        )
    weight = torch.where(keep, 1.0, float("nan"))
    (out.logp * weight + out.fkl * weight).sum().backward()
    assert bool((leaf.grad[~keep] == 0).all()) and bool(leaf.grad[keep].isfinite().all())


def test_batches_keep_their_shape(backend):
    logits, _, targets = make((24, 9, "some"), FP32)
    flat = prefkern.logits_logps(logits, targets, backend=backend).logp
    out = prefkern.logits_logps(
        logits.reshape(4, 6, 9), targets.reshape(4, 6), backend=backend
    ).logp
    assert out.shape == (4, 6)
    assert_same_bits(out.flatten(), flat)


def test_equal_logits_give_exact_zeros(backend):
    logits, _, targets = make((16, 33, "none"), FP32)
    stats = ("fkl", "rkl", "jsd:0.5", "tv", "bkl:4")
    out = prefkern.logits_logps(
        logits, targets, ref_logits=logits.clone(), stats=stats, backend=backend
    )
    for stat in stats:
        assert bool((getattr(out, field_of(stat)) == 0).all()), stat


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"targets": torch.zeros(5, dtype=torch.long)}, "targets"),
        ({"targets": torch.zeros(8)}, "targets"),
        ({"targets": torch.full((8,), 20)}, "targets"),
        ({"ref_logits": torch.zeros(8, 19), "stats": ("fkl",)}, "ref_logits"),
        ({"ref_logits": torch.zeros(8, 20, requires_grad=True), "stats": ("fkl",)}, "ref_logits"),
        ({"stats": ("fkl",)}, "ref"),
        ({"stats": ("ent", "entropyy")}, "entropyy"),
        ({"logits": torch.zeros(8, 20, dtype=torch.long)}, "logits"),
        ({"temperature": 0.0}, "temperature"),
    ],
    ids=[
        "targets_shape",
        "targets_dtype",
        "targets_range",
        "ref_shape",
        "ref_requires_grad",
        "no_reference",
        "unknown",
        "logits_dtype",
        "temperature",
    ],
)
def test_bad_input(backend, change, match):
    arguments = {
        "logits": torch.zeros(8, 20),
        "targets": torch.zeros(8, dtype=torch.long),
        **change,
    }
    with pytest.raises(ValueError, match=match):
        prefkern.logits_logps(
            arguments.pop("logits"), arguments.pop("targets"), backend=backend, **arguments
        )


# selective_log_softmax: TRL's function, which takes no backend argument


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("lead", [(7,), (3, 5)], ids=["N", "B_T"])
def test_selective_log_softmax_gathers_log_probabilities(backend, dtype, lead):
    logits = torch.randn(*lead, 19).to(dtype)
    index = torch.randint(0, 19, lead)
    with prefkern.use_backend(backend):
        got = prefkern.selective_log_softmax(logits, index)
    want = torch.log_softmax(logits.double(), -1).gather(-1, index[..., None])[..., 0]
    assert got.shape == index.shape
    unit = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=2 * unit, atol=16 * torch.finfo(FP32).eps)


def test_selective_log_softmax_of_several_indices(backend):
    """index [..., K] gives [..., K], values and gradients."""
    logits = torch.randn(4, 6, 19, dtype=FP64, requires_grad=True)
    index = torch.randint(0, 19, (4, 6, 3))
    up = torch.randn(4, 6, 3, dtype=FP64)
    with prefkern.use_backend(backend):
        got = prefkern.selective_log_softmax(logits, index, temperature=1.7)
    want = torch.log_softmax(logits / 1.7, -1).gather(-1, index)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    (a,) = torch.autograd.grad((got * up).sum(), logits)
    (b,) = torch.autograd.grad((want * up).sum(), logits)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_selective_log_softmax_row_mask(backend):
    """Rows outside the mask give exactly 0 and no gradient, whatever they hold."""
    logits = torch.randn(4, 6, 19)
    index = torch.randint(0, 19, (4, 6))
    mask = torch.rand(4, 6) < 0.6
    logits[~mask] = float("nan")
    index[~mask] = -100
    logits.requires_grad_()
    with prefkern.use_backend(backend):
        got = prefkern.selective_log_softmax(logits, index, row_mask=mask)
    want = torch.log_softmax(logits.detach()[mask].double(), -1).gather(-1, index[mask][:, None])[
        :, 0
    ]
    torch.testing.assert_close(got[mask].double(), want, rtol=0, atol=1e-5)
    assert bool((got[~mask] == 0).all())
    got.sum().backward()
    assert bool((logits.grad[~mask] == 0).all()) and bool(logits.grad[mask].isfinite().all())


def test_selective_log_softmax_of_several_indices_under_a_mask(backend):
    """A masked row may hold any index, also the usual -100 of padding."""
    logits = torch.randn(3, 5)
    index = torch.tensor([[1, 2], [-100, -100], [0, 4]])
    mask = torch.tensor([True, False, True])
    with prefkern.use_backend(backend):
        got = prefkern.selective_log_softmax(logits, index, row_mask=mask)
    want = torch.log_softmax(logits[mask].double(), -1).gather(-1, index[mask])
    torch.testing.assert_close(got[mask].double(), want, rtol=0, atol=1e-5)
    assert bool((got[~mask] == 0).all())


@pytest.mark.parametrize("index", [-100, -1, 5], ids=str)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_selective_log_softmax_refuses_an_index_outside_the_vocabulary(backend, index, several):
    """Nothing is ignored here without a row_mask: -100 would otherwise come back as a silent 0."""
    ids = torch.tensor([1, index, 2])
    with prefkern.use_backend(backend), pytest.raises(ValueError, match="index"):
        prefkern.selective_log_softmax(torch.randn(3, 5), ids[:, None] if several else ids)
