"""Tiles given to single kernels: chunks, alignment, order of threads, far offsets, bad arguments.

Not collected by itself: test_emulated_heads.py runs it where the emulated library is loaded.
"""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from cases import BF16, FP16, FP32
from closeness import assert_same_bits

from prefkern.backends import cuda
from prefkern.backends.tiled import rows
from prefkern.backends.tiled.epilogue import COEFFICIENTS, NORMS, SECOND_FIELDS, LogitOptions, Tile
from prefkern.backends.tiled.heads import make_call, parse

OPS = torch.ops.prefkern_cuda
ONE = ("logp", "ent", "col", "top1", "zmean")
TWO = ("logp", "fkl", "rkl", "jsd:0.3", "alpha:0.4", "renyi:0.6", "tv", "bkl:3", "mix:0.25", "ent")
PLAIN = LogitOptions(1.0, None, 1.0)
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=lambda d: str(d)[6:])


def make(stats, m, w, dtype, models, option=PLAIN):
    g = torch.Generator().manual_seed(w)
    z = [(3 * torch.randn(m, w, generator=g)).to(dtype) for _ in range(models)]
    z[0][:, w // 2] = -math.inf
    targets = torch.randint(0, w, (m,), generator=g)
    targets[m // 2] = -1
    call = make_call(parse(stats), [option] * models, "", w, dtype, targets, given=True)
    return call, z


def fold(call, z, chunk):
    """Row sums of one tile, folded in chunks."""
    m, w = z[0].shape
    fields = torch.full((len(call.fields), -(-w // chunk), m), math.nan)
    at_target = torch.zeros(2, m)
    kernels = cuda.Kernels()
    kernels.chunk_columns = lambda call: chunk
    kernels.fold(call, Tile(0, 0, z[0], z[1] if len(z) > 1 else None), fields, at_target)
    assert not fields.isnan().any(), "a field of a finite tile is not written, or not a number"
    starts = torch.arange(0, w, chunk, dtype=torch.float64)
    sums = rows.merge(call, fields, starts)
    sums["zy"], sums["ref_zy"], sums["target"] = *at_target.double(), call.targets.double()
    live = call.targets >= 0
    return {k: v[live] for k, v in sums.items() if not k.startswith("top_")}


@DTYPES
@pytest.mark.parametrize("stats", [("logp",), ONE, TWO], ids=["small", "one", "two"])
def test_chunks_change_roundings_alone(stats, dtype):
    """A block of several chunks writes one of them and nothing's sums into the others."""
    call, z = make(stats, 5, 1500, dtype, 2 if stats is TWO else 1)
    want = fold(call, z, 1500)
    for chunk in (32, 64, 1024):
        got = fold(call, z, chunk)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=2e-5, msg=name)
            if name in ("max", "top", "z_count", "zy"):
                assert_same_bits(got[name], want[name])


def some_coefficients(m):
    """Every term of the gradient but ev, which would need its values."""
    made = torch.randn(len(COEFFICIENTS), m)
    made[COEFFICIENTS.index("ev")] = 0.0
    return made


def shifted(x, by):
    """The same tile with rows `by` elements off a 16-byte boundary."""
    m, w = x.shape
    wide = torch.full((m, w + 24), math.nan, dtype=x.dtype)
    view = wide[:, by : by + w]
    return view.copy_(x)


@DTYPES
@pytest.mark.parametrize("by", [(1, 1), (3, 3), (5, 2), (8, 8)], ids=str)
def test_alignment_changes_roundings_alone(dtype, by):
    call, z = make(TWO, 3, 333, dtype, 2)
    want, got = fold(call, z, 333), fold(call, [shifted(*x) for x in zip(z, by, strict=True)], 333)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=2e-6, atol=2e-5, msg=name)
    coefficients = some_coefficients(3)
    kernels, places = cuda.Kernels(), []
    for x in (z, [shifted(*x) for x in zip(z, by, strict=True)]):
        dx = shifted(torch.full_like(z[0], math.nan), by[0]) if x is not z else x[0].clone()
        kernels.gradient(call, Tile(0, 0, *x), coefficients, dx)
        places.append(dx)
    assert_same_bits(places[1], places[0])
    assert (places[0][call.targets < 0] == 0).all()


def test_no_bit_depends_on_the_order_of_threads_and_blocks():
    call, z = make(TWO, 4, 700, BF16, 2)
    logits = shifted(z[0], 3)
    g = torch.Generator().manual_seed(0)
    d_out = torch.randn(len(TWO), 4, generator=g)

    def run():
        out, saved = cuda.logits_logps_fwd(logits, call.targets, z[1], 0.7, -1, TWO)
        d = cuda.logits_logps_bwd(d_out, logits, call.targets, z[1], out, saved, 0.7, -1, TWO)
        return [*fold(call, z, 64).values(), out, saved, d]

    forwards = run()
    OPS.reverse_threads(True)
    try:
        backwards = run()
    finally:
        OPS.reverse_threads(False)
    for a, b in zip(forwards, backwards, strict=True):
        assert_same_bits(a, b)


def test_rows_past_2_to_the_31_elements():
    """A tile whose third row starts beyond 2^31 elements: memory is mapped, not filled."""
    m, w, stride = 3, 40, (1 << 30) + 8
    no_reserve = 0x4000  # MAP_NORESERVE, which Python names from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    far = [
        torch.frombuffer(mmap.mmap(-1, 2 * (2 * stride + w), flags=flags), dtype=BF16)
        for _ in range(3)
    ]
    assert 2 * stride > 2**31
    views = [x.as_strided((m, w), (stride, 1)) for x in far]
    call, z = make(TWO, m, w, BF16, 2)
    for view, x in zip(views, z, strict=False):
        view.copy_(x)
    want, got = fold(call, z, w), fold(call, views[:2], w)
    for name in want:
        assert_same_bits(got[name], want[name])
    coefficients, near = some_coefficients(m), torch.empty_like(z[0])
    kernels = cuda.Kernels()
    kernels.gradient(call, Tile(0, 0, *z), coefficients, near)
    kernels.gradient(call, Tile(0, 0, *views[:2]), coefficients, views[2])
    assert_same_bits(views[2].clone(), near)
    norms = torch.randn(len(NORMS), m)
    sums = [torch.empty(len(SECOND_FIELDS), 1, m) for _ in range(2)]
    kernels.fold_second(call, Tile(0, 0, *z), norms, sums[0])
    kernels.fold_second(call, Tile(0, 0, *views[:2]), norms, sums[1])
    assert_same_bits(*sums)


def test_a_label_outside_the_vocabulary_gives_nan_and_no_bad_access():
    logits = torch.randn(4, 50)
    targets = torch.tensor([3, 50, -7, -100])
    out, saved = cuda.logits_logps_fwd(logits, targets, None, 1.0, -100, ("logp", "lse"))
    assert out[0].isnan().tolist() == [False, True, True, False]
    assert not out[1].isnan().any() and (out[:, 3] == 0).all()
    d = cuda.logits_logps_bwd(
        torch.ones(2, 4), logits, targets, None, out, saved, 1.0, -100, ("logp", "lse")
    )
    assert (d[3] == 0).all()


@pytest.mark.parametrize(
    "change, match",
    [
        ({"fields": torch.empty(2, 3, 5)}, r"fields must have shape \[2, 1, 5\], got \[2, 3, 5\]"),
        ({"z": torch.zeros(5, 40, dtype=torch.float64)}, "z must be float32, bfloat16 or float16"),
        ({"z": torch.zeros(40, 5).T}, "z must have a contiguous last dimension"),
        ({"targets": torch.zeros(5)}, "targets must be int64; cast it first"),
        ({"chunk": 0}, r"chunk must lie in \[1, 16777216\], got 0"),
        ({"stats": "logp,what"}, "stats must be distinct statistic names"),
        ({"numbers": [1.0]}, "numbers must hold 9 values, got 1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments_say_what_must_hold(change, match):
    given = {
        "z": torch.zeros(5, 40), "zr": None, "za": None, "adv": None, "bias": None,
        "ref_bias": None, "targets": torch.zeros(5, dtype=torch.int64),
        "fields": torch.empty(2, 1, 5), "at_target": torch.zeros(2, 5), "keep": None,
        "ref_keep": None, "v0": 0, "chunk": 40, "small": True, "rounds": False, "working": 0,
        "stats": "logp", "numbers": [1.0, 0.0] * 4 + [0.0],
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=match):
        OPS.fold(**{**given, **change})
