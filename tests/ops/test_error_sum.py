"""error_sum: prediction errors per sample and segment, plain fp64 loops as the oracle."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import BF16, FP16, FP32, FP64
from closeness import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from prefkern.ops.error_sum import ErrorSums, error_sum

OP = "error_sum"
ALL = ("err", "ref_err", "dot", "huber:0.25")


def oracle(p, t, q, stats, segments, count, dim):
    """Sums and d sum / dp of one sample by a loop over its elements."""
    sums = [[0.0] * count for _ in stats]
    slopes = [torch.zeros(p.shape, dtype=FP64) for _ in stats]
    for at in itertools.product(*map(range, p.shape)):
        segment = 0 if segments is None else segments[at[dim - 1]]
        if segment < 0:
            continue
        a, b = p[at].item(), t[at].item()
        c = 0.0 if q is None else q[at].item()
        for k, stat in enumerate(stats):
            name, _, width = stat.partition(":")
            if name == "err":
                value, slope = (a - b) ** 2, 2 * (a - b)
            elif name == "ref_err":
                value, slope = (c - b) ** 2, 0.0
            elif name == "dot":
                value, slope = a * (b - c), b - c
            else:
                root = math.sqrt((a - b) ** 2 + float(width) ** 2)
                value, slope = root - float(width), (a - b) / root
            sums[k][segment] += value
            slopes[k][at] = slope
    return sums, slopes


def tensors(shape, dtype=FP64, seed=0, other=None):
    g = torch.Generator().manual_seed(seed)
    p, t, q = (torch.randn(*shape, generator=g, dtype=FP64).to(dtype) for _ in range(3))
    other = dtype if other is None else other
    return p.requires_grad_(), t.to(other), q.to(other)


def check(backend, shape, dtype, stats, segments=None, count=1, dim=1, other=None):
    p, t, q = tensors(shape, dtype, other=other)
    kwargs = {}
    if segments is not None:
        kwargs = {
            "segments": torch.tensor(segments),
            "num_segments": count,
            "segment_dim": dim,
        }
    got = error_sum(p, t, q, stats=stats, reduction="sum", backend=backend, **kwargs)
    elements = math.prod(shape[1:])
    up, total = {}, 0.0
    for stat in stats:
        value = getattr(got, stat.partition(":")[0])
        assert value.dtype == FP64
        assert value.shape == ((shape[0],) if segments is None else (shape[0], count))
        assert value.requires_grad == (stat != "ref_err")
        up[stat] = torch.randn(value.shape, dtype=FP64)
        total = total + (up[stat] * value).sum()
    grad = torch.zeros_like(p)
    if total.requires_grad:
        (grad,) = torch.autograd.grad(total, p)
    assert grad.dtype == dtype
    for b in range(shape[0]):
        sums, slopes = oracle(p[b].detach(), t[b], q[b], stats, segments, count, dim)
        slope = torch.zeros(shape[1:], dtype=FP64)
        for k, stat in enumerate(stats):
            value = getattr(got, stat.partition(":")[0])[b].reshape(-1).tolist()
            assert value == pytest.approx(sums[k], rel=1e-13, abs=4e-16 * elements)
            if stat != "ref_err":
                weight = up[stat][b].reshape(-1)
                if segments is None:
                    slope += weight * slopes[k]
                else:
                    along = [1] * len(shape[1:])
                    along[dim - 1] = len(segments)
                    index = torch.tensor(segments).clamp(min=0)
                    slope += weight[index].reshape(along) * slopes[k]
        # formed in fp64 and rounded once to p's dtype
        unit = torch.finfo(dtype).eps
        small = 1e-14 if dtype == FP64 else 1e-7
        torch.testing.assert_close(grad[b].double(), slope, rtol=unit, atol=small)


SHAPES = [(3, 1), (1, 5), (2, 7, 3), (3, 2, 3, 4), (2, 257), (2, 4, 131), (0, 3)]


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16, FP16], ids=["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_gradients(backend, shape, dtype):
    check(backend, shape, dtype, ALL)
    for stat in ALL:
        check(backend, shape, dtype, (stat,))


@pytest.mark.parametrize("other", [FP32, FP64])
def test_prediction_in_16_bits_and_target_in_more(backend, other):
    check(backend, (2, 3, 50), BF16, ALL, other=other)


LAYOUTS = {
    "frames_first": ((2, 5, 3, 2), [0, 0, 1, 1, 2], 3, 1),
    "channels_first": ((2, 3, 5, 2, 2), [0, 0, 1, 1, 2], 3, 2),
    "last_axis": ((2, 3, 4), [1, 0, 1, 0], 2, 2),
    "an_empty_segment": ((2, 4, 3), [0, 0, 2, 2], 3, 1),
    "frames_left_out": ((2, 5, 3), [-1, 0, 1, -1, 1], 2, 1),
    "all_left_out": ((2, 3, 3), [-1, -1, -1], 1, 1),
}


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_segments(backend, layout, dtype):
    shape, segments, count, dim = layout
    check(backend, shape, dtype, ALL, segments, count, dim)


def test_any_layout(backend):
    settings(max_examples=30, deadline=None, derandomize=True)(
        given(data=st.data())(lambda data: check_any(backend, data))
    )()


def check_any(backend, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=2, max_size=5)))
    dim = data.draw(st.integers(1, len(shape) - 1))
    count = data.draw(st.integers(1, 4))
    frames = st.lists(st.integers(-1, count - 1), min_size=shape[dim], max_size=shape[dim])
    check(backend, shape, FP64, ALL, data.draw(frames), count, dim)


def test_reductions(backend):
    p, t, q = tensors((2, 3, 5, 2))
    segments = torch.tensor([0, 2, -1, 2, 2])
    given = {"segments": segments, "num_segments": 3, "segment_dim": 2, "backend": backend}
    plain = error_sum(p, t, q, reduction="sum", **given)
    mean = error_sum(p, t, q, reduction="mean", **given)
    total = error_sum(p, t, q, reduction="mean_all", **given)
    per_segment = torch.tensor([6.0, 1.0, 18.0], dtype=FP64)  # the empty one divides by 1
    for name in ("err", "ref_err"):
        a, b, c = (getattr(x, name) for x in (plain, mean, total))
        torch.testing.assert_close(b, a / per_segment)
        torch.testing.assert_close(c, a / 24.0)
    whole = error_sum(p, t, backend=backend)
    torch.testing.assert_close(whole.err, ((p - t) ** 2).flatten(1).mean(1))
    assert whole.ref_err is None and isinstance(whole, ErrorSums)


def test_many_blocks_and_threads_give_the_same_bits(backend):
    """40,003 elements are three partial sums; the last is ragged."""
    p, t, q = tensors((2, 40_003), FP32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3) if backend == "cpu" else (1,):
            torch.set_num_threads(threads)
            r = error_sum(p, t, q, stats=ALL, backend=backend)
            (grad,) = torch.autograd.grad((r.err + r.dot + r.huber).sum(), p)
            results.append((r.err.detach(), r.ref_err, r.dot.detach(), r.huber.detach(), grad))
    finally:
        torch.set_num_threads(before)
    if backend == "cpu":
        for other in results[1:]:
            for a, b in zip(other, results[0], strict=True):
                assert_same_bits(a, b)
    pd, td, qd = (x.detach().double() for x in (p, t, q))
    torch.testing.assert_close(results[0][0], ((pd - td) ** 2).mean(1), rtol=1e-13, atol=0)
    torch.testing.assert_close(results[0][2], (pd * (td - qd)).mean(1), rtol=0, atol=1e-13)


def test_the_change_of_the_error_keeps_its_digits(backend):
    """|p - q| ~ 1e-3 on a latent of 4x64x64: fp32 means are off by about 2e-8."""
    g = torch.Generator().manual_seed(3)
    q, t = torch.randn(1, 4, 64, 64, generator=g), torch.randn(1, 4, 64, 64, generator=g)
    p = q + 1e-3 * torch.randn(1, 4, 64, 64, generator=g)
    got = error_sum(p, t, q, backend=backend)
    a, b, c = (x.double() for x in (p, q, t))
    exact = ((a - b) * (a + b - 2 * c)).mean().item()  # the product form
    assert (got.err - got.ref_err).item() == pytest.approx(exact, abs=1e-14)
    assert abs(((p - t) ** 2).mean().item() - ((q - t) ** 2).mean().item() - exact) > 1e-10


def test_equal_predictions_change_nothing(backend):
    p, t, _ = tensors((3, 1000), FP32)
    r = error_sum(p, t, p.detach(), backend=backend)
    assert_same_bits(r.err.detach(), r.ref_err)


def test_frames_left_out_may_hold_nan(backend):
    p, t, q = tensors((2, 4, 3), FP32)
    for x in (p.data, t, q):
        x[:, 1] = torch.nan
        x[:, 3] = torch.inf
    segments = torch.tensor([0, -1, 1, -1], dtype=torch.int32)
    r = error_sum(p, t, q, stats=ALL, segments=segments, num_segments=2, backend=backend)
    (grad,) = torch.autograd.grad((r.err + r.dot + r.huber).sum(), p)
    assert all(torch.isfinite(x).all() for x in r)
    assert torch.isfinite(grad).all() and (grad[:, [1, 3]] == 0).all()


def test_segments_beyond_32_bits_leave_frames_out():
    p, t, _ = tensors((2, 3, 4))
    for far in (-1, -(2**32), -(2**63)):
        found = error_sum(p, t, segments=torch.tensor([0, far, 1]), num_segments=2).err
        want = error_sum(p[:, [0, 2]], t[:, [0, 2]], segments=torch.tensor([0, 1]), num_segments=2)
        assert_same_bits(found.detach(), want.err.detach())


def test_a_segment_out_of_range_is_nan_where_it_cannot_be_read(monkeypatch):
    """As on a GPU, which is not asked about values."""
    monkeypatch.setattr("prefkern.ops.error_sum._check_range", lambda *_: None)
    p, t, q = tensors((2, 3, 4))
    for far in (2, 2**32):
        segments = torch.tensor([0, far, 1])
        r = error_sum(p, t, q, segments=segments, num_segments=2, backend="eager")
        assert r.err.isnan().all() and r.ref_err.isnan().all()


def test_a_width_is_read_as_python_reads_it(backend):
    p, t, _ = tensors((2, 30))
    want = error_sum(p, t, stats="huber:0.5", backend=backend).huber.detach()
    for text in ("huber: 0.5", "huber:5e-1", "huber:+0.5", "huber:0_0.5"):
        assert_same_bits(error_sum(p, t, stats=text, backend=backend).huber.detach(), want)


def test_nan_stays_in_its_sample(backend):
    p, t, _ = tensors((3, 600))
    p.data[1, 300] = torch.nan
    r = error_sum(p, t, backend=backend)
    assert r.err.isnan().tolist() == [False, True, False]


def test_a_sample_without_weight_gets_no_gradient(backend):
    """A clamped loss sends 0: even an infinite error must not turn that into NaN."""
    p, t, q = tensors((2, 20), FP32)
    p.data[1] = torch.inf
    r = error_sum(p, t, q, stats=ALL, backend=backend)
    up = torch.tensor([1.0, 0.0], dtype=FP64)
    total = sum(torch.where(up > 0, x, 0.0).sum() for x in (r.err, r.dot, r.huber))
    (grad,) = torch.autograd.grad(total, p)
    assert torch.isfinite(grad).all() and (grad[1] == 0).all()


def test_strides(backend):
    p, t, q = tensors((4, 3, 6))
    want = error_sum(p, t, q, stats=ALL, backend=backend)
    wide = torch.zeros(6, 3, 8, dtype=FP64)
    view = wide.permute(2, 1, 0)[::2]
    view.copy_(p.detach())
    got = error_sum(view, t.permute(2, 1, 0).contiguous().permute(2, 1, 0), q, stats=ALL,
                    backend=backend)  # fmt: skip
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b.detach())


def test_gradcheck(backend):
    p, t, q = tensors((2, 3, 2))
    segments = torch.tensor([0, -1, 1])

    def call(x):
        r = error_sum(x, t, q, stats=ALL, segments=segments, num_segments=2, backend=backend)
        return r.err, r.dot, r.huber

    assert torch.autograd.gradcheck(call, p)


def test_second_derivative_is_refused(backend):
    p, t, _ = tensors((2, 3))
    (grad,) = torch.autograd.grad(error_sum(p, t, backend=backend).err.sum(), p, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_backward_twice_gives_the_same_bits(backend):
    p, t, q = tensors((2, 500), FP32)
    total = error_sum(p, t, q, stats=ALL, backend=backend).err.sum()
    once, twice = (torch.autograd.grad(total, p, retain_graph=True)[0] for _ in range(2))
    assert_same_bits(once, twice)


def test_opcheck(backend):
    p, t, q = tensors((2, 6), FP32)
    p, t, q = (x.reshape(2, 1, 3, 2) for x in (p.detach(), t, q))
    segments = torch.tensor([0, 1, -1], dtype=torch.int32)
    forward, backward = torch.ops.prefkern.error_sum_fwd, torch.ops.prefkern.error_sum_bwd
    for ref, index, count, stats in (
        (None, None, 1, "err"),
        (q, None, 1, "err,ref_err"),
        (q, segments, 2, ",".join(ALL)),
    ):
        leaf = p.clone().requires_grad_()
        torch.library.opcheck(forward, (leaf, t, ref, index, count, stats, backend))
        d_out = torch.randn(len(stats.split(",")), 2, count, dtype=FP64)
        torch.library.opcheck(backward, (d_out, p, t, ref, index, stats, backend))


def test_compiles_whole(backend):
    p, t, q = tensors((2, 4, 3), FP32)
    segments = torch.tensor([0, 0, 1, -1])

    def step(x):
        r = error_sum(2.0 * x, t, q, segments=segments, num_segments=2, backend=backend)
        return ((r.err - r.ref_err) ** 2).sum()

    torch.compiler.reset()
    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = f(p)
        results.append((loss.detach(), torch.autograd.grad(loss, p)[0]))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


def test_autocast_does_not_reach_in(backend):
    p, t, q = tensors((2, 30), FP32)
    want = error_sum(p, t, q, backend=backend)
    with torch.autocast("cpu", dtype=BF16):
        got = error_sum(p, t, q, backend=backend)
    assert_same_bits(got.err.detach(), want.err.detach())


X = torch.zeros(2, 3, 4)
SEGMENTS = torch.tensor([0, 1, 0])
BAD = {
    "a list": (dict(pred=[1.0]), "pred must be a torch.Tensor"),
    "integers": (dict(pred=torch.zeros(2, 3, dtype=torch.long)), "pred must be float"),
    "one axis": (dict(pred=torch.zeros(3), target=torch.zeros(3)), r"\[B, \.\.\.\]"),
    "other target": (dict(target=torch.zeros(2, 3)), "target must be"),
    "other ref": (dict(ref=torch.zeros(2, 3, 5)), "ref must be"),
    "target trains": (dict(target=X.clone().requires_grad_()), "target must not require grad"),
    "ref trains": (dict(ref=X.clone().requires_grad_()), "ref must not require grad"),
    "unknown": (dict(stats=("mse",)), "distinct names"),
    "twice": (dict(stats=("err", "err")), "distinct names"),
    "none": (dict(stats=()), "at least one"),
    "no width": (dict(stats=("huber",)), "with its width"),
    "bad width": (dict(stats=("huber:x",)), "width of huber"),
    "width 0": (dict(stats=("huber:0",)), "width of huber"),
    "no ref": (dict(stats=("ref_err",)), "needs ref"),
    "reduction": (dict(reduction="none"), "reduction must be one of"),
    "count alone": (dict(num_segments=2), "comes with segments"),
    "no count": (dict(segments=SEGMENTS), "num_segments must be an int"),
    "count 0": (dict(segments=SEGMENTS, num_segments=0), "num_segments must be an int"),
    "too few": (dict(segments=SEGMENTS, num_segments=1), "below num_segments"),
    "2^32": (dict(segments=torch.tensor([0, 1, 2**32]), num_segments=2), "got 4294967296"),
    "most": (dict(segments=SEGMENTS, num_segments=2**31), "num_segments must be at most"),
    "float segments": (dict(segments=SEGMENTS.float(), num_segments=2), "segments must be integ"),
    "length": (dict(segments=SEGMENTS[:2], num_segments=2), "segments must be integ"),
    "axis 0": (dict(segments=SEGMENTS, num_segments=2, segment_dim=0), "segment_dim"),
    "axis 3": (dict(segments=SEGMENTS, num_segments=2, segment_dim=3), "segment_dim"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_input(backend, change, message):
    with pytest.raises(ValueError, match=message):
        error_sum(**{"pred": X, "target": X, "backend": backend, **change})
