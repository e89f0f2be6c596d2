"""Mistakes planted around the Triton kernels of the head ops; the suite's checks must see them.

Each fault wraps the kernels or a product of the driver and is what a plausible slip would do. The
kernels without a fault pass the same checks in test_head_tiles.py and tests/ops.
"""

from __future__ import annotations

import pytest
import torch
from cases import BF16, FP32, MANY_ROWS, Regime, backends_on, upstream_for
from closeness import assert_same_bits
from op_checks import check_closeness, check_masked_rows, inputs_of, run_op, run_oracle
from prefkern.kernels.epilogue import Kernels

import prefkern
from prefkern.backends import memory, tables
from prefkern.backends.tiled import backward, factors, products, tiles, tiling

pytestmark = pytest.mark.skipif("triton" not in backends_on(), reason="the triton backend is off")

CASE = Regime("faults", N=60, V=300, D=24)
STATS = ("logp", "lse", "ent")
BUDGET = 1 << 20


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch):
    monkeypatch.setattr(Kernels, "chunk_columns", lambda self, sweep: 128)
    monkeypatch.setattr(memory, "tile_bytes", lambda device: 1024)
    monkeypatch.setattr(tiling, "ROW_ALIGN", 16)


def narrow_sums(monkeypatch):
    """Sums of a chunk in bf16."""
    fold = Kernels.fold

    def narrow(self, sweep, tile, fields, at, keep):
        fold(self, sweep, tile, fields, at, keep)
        fields.copy_(fields.bfloat16())

    monkeypatch.setattr(Kernels, "fold", narrow)


def narrow_hidden_gradient(monkeypatch):
    """dH rounded to bf16 at every tile."""
    add = products.add_product

    def narrow(a, b, total, *, fresh=False):
        add(a, b, total, fresh=fresh)
        total.copy_(total.bfloat16())

    monkeypatch.setattr(backward, "add_product", narrow)


def short_products(monkeypatch):
    """fp32 operands with tf32's 10 bits of mantissa."""

    def short(x):
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)

    for module in (tiles, backward):
        monkeypatch.setattr(
            module, "product", lambda a, b, out: torch.mm(short(a), short(b), out=out)
        )


def leaked_lane(monkeypatch):
    """The fold also reads a column behind the tile, where a workspace holds anything."""
    fold = Kernels.fold

    def wide(self, sweep, tile, fields, at, keep):
        (x,) = tile.x
        leak = x.as_strided((x.shape[0], x.shape[1] + 1), x.stride(), x.storage_offset())
        leaky = type(tile)(tile.r0, tile.v0, (leak if leak.shape[1] < 128 else x,))
        fold(self, sweep, leaky, fields, at, keep)

    monkeypatch.setattr(Kernels, "fold", wide)


def leaked_row(monkeypatch):
    """Ignored rows are computed like others and multiplied by 0 at the end."""
    finish = Kernels.arithmetic.finish

    def multiply(call, folded, second):
        out, saved = finish(call, folded, second)
        live = call.targets != call.ignore_index
        return torch.where(live, out, float("nan")) * live, saved

    monkeypatch.setattr("prefkern.ops.linear_stats.scored_rows", lambda *_: None)
    monkeypatch.setattr(Kernels.arithmetic, "finish", multiply)


def multiplied_rows(monkeypatch):
    """dW from rows that do not count as they are: 0 times what they hold."""
    gather = backward.gather

    def as_they_are(call, *, backward=False):
        return gather(call, backward=False)

    monkeypatch.setattr("prefkern.ops.linear_stats.scored_rows", lambda *_: None)
    monkeypatch.setattr(backward, "gather", as_they_are)


def stale_maximum(monkeypatch):
    """A frozen head's sums are not moved when a later tile raises the maximum."""
    monkeypatch.setattr(Kernels, "raise_rows", lambda self, *args: None)


def last_tile_of_rows(monkeypatch):
    """dW leaves out the last block of rows."""
    add = backward._RightSum.add

    def skip(self, dx, left, step):
        last = step.r1 == self.m and step.r0 > 0
        add(self, torch.zeros_like(dx) if last else dx, left, step)

    monkeypatch.setattr(backward._RightSum, "add", skip)


def maxima_of_the_tile(monkeypatch):
    """The terms of a frozen head are relative to the tile's own maxima, not to the row's so far."""
    fold = factors.Factors.fold

    def own(self, tile, fields, at, head):
        self.maxima.fill_(torch.finfo(fields.dtype).min)
        fold(self, tile, fields, at, head)

    monkeypatch.setattr(factors.Factors, "fold", own)


FAULTS = {
    narrow_sums: (FP32, {}),
    narrow_hidden_gradient: (FP32, {}),
    short_products: (FP32, {}),
    leaked_lane: (FP32, {}),
    last_tile_of_rows: (FP32, {}),
    stale_maximum: (FP32, {"wanted": ("hidden",)}),
    maxima_of_the_tile: (FP32, {"wanted": ("hidden",)}),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_planted_fault_turns_closeness_red(fault, monkeypatch):
    dtype, arguments = FAULTS[fault]
    inputs = inputs_of("linear_logps", CASE, dtype)
    check_closeness("triton", inputs, STATS, **arguments)
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=r"worse than|not finite"):
        check_closeness("triton", inputs, STATS, **arguments)


def test_narrow_sums_bias_a_small_divergence_of_16_bit_inputs(monkeypatch):
    """Closeness to a bf16 baseline is too kind here; a true KL of about 1e-4 nats is not."""
    inputs = inputs_of("linear_divergence", CASE, BF16, shared=True)
    noise = torch.randn(inputs.hidden.shape, generator=torch.Generator().manual_seed(5))
    near = (inputs.hidden.float() + 0.008 * noise).bfloat16()
    inputs = inputs.replace(ref_hidden=near, values=None)
    truth = run_oracle(inputs, ("fkl",), None).values["fkl"].mean()
    assert 2e-5 < truth < 5e-4

    def bias():
        return abs(float(run_op("triton", inputs, ("fkl",), None)[0]["fkl"].mean()) / truth - 1)

    assert bias() < 0.05
    narrow_sums(monkeypatch)
    assert bias() > 0.05


@pytest.mark.parametrize("fault", [leaked_row, multiplied_rows], ids=lambda f: f.__name__)
def test_a_masked_row_that_leaks_is_seen(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=r"differ|exactly 0"):
        check_masked_rows("triton", inputs_of("linear_logps", CASE, FP32), STATS, float("nan"))


def uncorrected_normaliser(monkeypatch):
    """Rounded logits with the normaliser of unrounded ones."""
    merge = Kernels.arithmetic.merge

    def plain(call, fields, starts, _):
        sums = merge(call, fields, starts, False)
        for name in ("max", "sum"):
            place = tables.FIELDS.index
            sums[place(f"round_{name}")] = sums[place(name)]
        return sums

    monkeypatch.setattr(Kernels.arithmetic, "merge", plain)


def test_a_normaliser_of_other_logits_is_seen(monkeypatch):
    inputs = inputs_of("linear_divergence", MANY_ROWS, BF16, lean=8.0)
    check_closeness("triton", inputs, ("logp", "ref_logp"))
    uncorrected_normaliser(monkeypatch)
    with pytest.raises(AssertionError, match="worse than"):
        check_closeness("triton", inputs, ("logp", "ref_logp"))


def test_a_cache_overwritten_by_dz_is_seen(monkeypatch):
    """dx over a kept tile: right once, wrong in a second backward of the same graph."""
    gradient = Kernels.gradient

    def over(self, sweep, tile, coefficients, dx):
        gradient(self, sweep, tile, coefficients, dx)
        # as a kernel does it, unseen by autograd's version count
        tile.x[0].numpy()[:] = dx.numpy()

    inputs = inputs_of("linear_logps", CASE, FP32)

    def twice():
        leaf = inputs.hidden.clone().requires_grad_()
        weight = inputs.weight.clone().requires_grad_()
        logp = prefkern.linear_logps(
            leaf, weight, inputs.targets, backend="triton", memory_budget=BUDGET
        ).logp
        total = logp.sum()
        first = torch.autograd.grad(total, leaf, retain_graph=True)[0]
        assert_same_bits(torch.autograd.grad(total, leaf)[0], first)

    twice()
    monkeypatch.setattr(Kernels, "gradient", over)
    with pytest.raises(AssertionError, match="differ"):
        twice()


def test_unwritten_memory_is_seen(monkeypatch):
    """The suite fills workspaces with NaN: a tile that a product skips cannot pass by luck."""
    inputs = inputs_of("linear_logps", CASE, FP32)
    monkeypatch.setattr(tiles, "product", lambda a, b, out: None)
    values, _ = run_op("triton", inputs, ("logp",), upstream_for(("logp",), CASE.N, FP32))
    assert bool(values["logp"][inputs.targets >= 0].isnan().all())
