"""The fused head (product and statistics in one kernel), under Triton's interpreter.

Blocks are 16 x 32 x 16 there; PROGRAMS is cut down so that a program walks over several blocks of
the vocabulary and a row is merged from several programs.
"""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP16, FP32, FP64, ONE_MODEL, OPTIONS, Options, Regime, backends_on
from checks import check_closeness, check_masked_rows, inputs_of, run_op
from closeness import stat_floor
from prefkern.kernels import fused, tiles

import prefkern
from prefkern.backends.eager import linear_logps as reference
from prefkern.backends.tiled.epilogue import LogitOptions
from prefkern.backends.tiled.heads import Head
from prefkern.ops import budget

pytestmark = pytest.mark.skipif("triton" not in backends_on(), reason="the triton backend is off")

# 3 x 5 blocks, all ragged; 2 blocks of the hidden size
CASE = Regime("fused", N=37, V=139, D=29)
TWO = ("logp", "lse", "zy", "ref_logp", "ref_lse", "fkl", "rkl")
ALL_OPTIONS = OPTIONS[-1]


@pytest.fixture(autouse=True)
def fused_everywhere(monkeypatch):
    """Two programs per row block, nothing kept, and a count of the fused forwards."""
    monkeypatch.setattr(fused, "PROGRAMS", 6)
    monkeypatch.setitem(budget.DEFAULT_BUDGET, "cpu", 0)
    ran = []
    made = fused.run
    monkeypatch.setattr(fused, "run", lambda ops: ran.append(ops) or made(ops))
    with tiles.use_scheme("fused"):
        yield ran


@pytest.mark.parametrize(
    ("stats", "dtype", "option"),
    [
        (("logp",), BF16, ALL_OPTIONS),
        (("logp", "lse", "zy"), FP32, OPTIONS[1]),  # -inf bias, the last block among them
        (ONE_MODEL, FP32, OPTIONS[3]),  # a negative scale turns the order of logits around
        (ONE_MODEL, BF16, ALL_OPTIONS),
        (("lse", "top1", "zmean"), FP16, Options("plain")),
    ],
    ids=["bf16-logp", "fp32-padded", "fp32-all", "bf16-all", "fp16-some"],
)
def test_one_model_is_as_close_as_it_must_be(stats, dtype, option, fused_everywhere):
    inputs = inputs_of("linear_logps", CASE, dtype, option=option)
    check_closeness("triton", inputs, stats, option=option)
    assert len(fused_everywhere) == 1


@pytest.mark.parametrize(
    ("dtype", "shared", "option"),
    [(FP32, True, OPTIONS[1]), (BF16, True, ALL_OPTIONS), (BF16, False, Options("plain"))],
    ids=["fp32-shared", "bf16-shared", "bf16-separate"],
)
def test_two_models_are_as_close_as_they_must_be(dtype, shared, option, fused_everywhere):
    inputs = inputs_of("linear_divergence", CASE, dtype, option=option, shared=shared)
    check_closeness("triton", inputs, TWO, option=option)
    assert len(fused_everywhere) == 1


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_equal_models_are_exactly_equal(dtype):
    inputs = inputs_of("linear_divergence", CASE, dtype, shared=True)
    same = inputs.replace(ref_hidden=inputs.hidden)
    values, _ = run_op("triton", same, TWO, None)
    assert bool((values["fkl"] == 0).all()) and bool((values["rkl"] == 0).all())
    assert bool((values["logp"] == values["ref_logp"]).all())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_ignored_rows_leave_nothing_behind(poison):
    inputs = inputs_of("linear_logps", CASE, BF16)
    check_masked_rows("triton", inputs, ("logp", "lse"), poison)


def test_rows_beyond_a_stated_count_that_is_too_large_are_nothing():
    """Their place is taken by row 0, which here is to be ignored and holds NaN."""
    inputs = inputs_of("linear_logps", CASE, FP32)
    ignored = inputs.targets < 0
    hidden = inputs.hidden.masked_fill(ignored[:, None], float("nan"))
    outs = []
    for h, count in ((inputs.hidden, None), (hidden, CASE.N)):
        head = Head(h, inputs.weight, LogitOptions(1.0, None, 1.0))
        outs.append(fused.forward([head], inputs.targets, -100, count, ONE_MODEL, 0, False)[0])
    assert bool(ignored[0]) and bool((outs[1][:, ignored] == 0).all())
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_both_schemes_give_the_same_numbers(dtype, fused_everywhere):
    inputs = inputs_of("linear_logps", CASE, dtype, option=ALL_OPTIONS)
    stats = ("logp", "lse", "ent")
    got, _ = run_op("triton", inputs, stats, None, option=ALL_OPTIONS)
    with tiles.use_scheme("tiles"):
        want, _ = run_op("triton", inputs, stats, None, option=ALL_OPTIONS)
    assert len(fused_everywhere) == 1
    for stat in stats:
        # both fold the same products, in another order
        floor = 2 * stat_floor("ent", FP32, 20.0)
        torch.testing.assert_close(got[stat], want[stat], rtol=0, atol=floor)


def test_what_cannot_be_fused_is_refused_or_goes_the_other_way(monkeypatch, fused_everywhere):
    inputs = inputs_of("linear_logps", CASE, FP32)
    hidden = inputs.hidden.clone().requires_grad_()

    def logps(**more):
        return prefkern.linear_logps(
            hidden, inputs.weight, inputs.targets, backend="triton", **more
        )

    with pytest.raises(ValueError, match="they keep nothing for a backward"):
        logps(memory_budget=1 << 20)
    with pytest.raises(ValueError, match=r"they compute in torch.float32.* got torch.float64"):
        run_op("triton", inputs_of("linear_logps", CASE, FP64), ("logp",), None)
    pair = inputs_of("linear_divergence", CASE, FP32)
    with pytest.raises(ValueError, match="they have no jsd"):
        run_op("triton", pair, ("logp", "jsd:0.5"), None)
    tall = inputs.weight.T.contiguous().T
    with pytest.raises(ValueError, match="rows of a head must be contiguous"):
        fused.forward(
            [Head(inputs.hidden, tall, LogitOptions(1.0, None, 1.0))], inputs.targets, -100, None,
            ("logp",), 0, False,
        )  # fmt: skip
    # a rule prefers it where it can serve, and says nothing where it cannot
    rule = ("linear_logps", "interpreter", "b32", 64, "run.json")
    monkeypatch.setattr(tiles, "FUSED_RULES", (rule,))
    assert not fused_everywhere
    with tiles.use_scheme("auto"):
        kept = logps(memory_budget=1 << 20).logp
        assert not fused_everywhere
        with torch.no_grad():
            free = logps().logp
    assert len(fused_everywhere) == 1
    torch.testing.assert_close(free, kept, rtol=0, atol=1e-5)


def test_nothing_to_score_is_nothing_to_launch(fused_everywhere):
    inputs = inputs_of("linear_logps", Regime("none", N=5, V=40, D=8, ignored="all"), FP32)
    values, grads = run_op("triton", inputs, ("logp",), {"logp": torch.ones(5)})
    assert bool((values["logp"] == 0).all()) and bool((grads["weight"] == 0).all())
    assert not fused_everywhere


@pytest.mark.parametrize("m", [1, 127, 8192, 65536])
@pytest.mark.parametrize("v", [1, 255, 32003, 151936])
def test_shares_cover_the_vocabulary_in_whole_blocks(m, v, monkeypatch):
    monkeypatch.setattr(fused, "PROGRAMS", 2048)
    share = fused.share_of(m, v, 128, 256)
    programs = -(-v // share) * -(-m // 128)
    assert share % 256 == 0 and (-(-v // share) - 1) * share < v
    assert programs <= 2048 + -(-m // 128) and (programs >= 1024 or share == 256)


def test_offsets_are_64_bit():
    """The last row of this head lies 2^31 elements after the first; pages between are never read,
    and so never take memory."""
    depth, step = 8, 1 << 30
    room = torch.empty(2 * step + depth, dtype=BF16)
    weight = room.as_strided((3, depth), (step, 1))
    weight.copy_(torch.randn(3, depth))
    hidden, targets = torch.randn(2, depth).to(BF16), torch.tensor([2, 1])
    head = Head(hidden, weight, LogitOptions(1.0, None, 1.0))
    out, *_ = fused.forward([head], targets, -100, None, ("logp", "ent"), 0, False)
    small = (hidden, weight.contiguous(), targets, None, 1.0, None, 1.0, -100, ("logp", "ent"))
    want, *_ = reference.linear_logps_fwd(*small, 0, False, None)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)


# ---- planted faults: what a compiler or a careless edit could do to the products

DEEP = Regime("deep", N=16, V=33, D=320)  # 20 blocks of the hidden size are summed


@pytest.mark.parametrize("stat", ["logp", "ent"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_narrow_sums_of_products_are_told_from_fp32_ones(stat, dtype, monkeypatch):
    from planted_dot import bf16_sums

    inputs = inputs_of("linear_logps", DEEP, dtype)
    check_closeness("triton", inputs, (stat,))
    monkeypatch.setattr("prefkern.kernels.fused_kernels._dot", bf16_sums)
    with pytest.raises(AssertionError, match="worse than"):
        check_closeness("triton", inputs, (stat,))


@pytest.mark.parametrize("stat", ["logp", "ent"])
def test_tf32_products_are_told_from_fp32_ones(stat, monkeypatch):
    from planted_dot import tf32_products

    monkeypatch.setattr("prefkern.kernels.fused_kernels._dot", tf32_products)
    inputs = inputs_of("linear_logps", DEEP, FP32)
    with pytest.raises(AssertionError, match="worse than"):
        check_closeness("triton", inputs, (stat,))
