"""Calls that used to give a plausible number, or an error of somebody else's: each is refused by a
sentence of ours, or right."""

from __future__ import annotations

import pytest
import torch
from cases import backends_on
from torch.autograd import forward_ad

import prefkern
from prefkern import Head

HUGE = 2**32
N, V, D = 6, 9, 4
CU = torch.tensor([0, 3, 6])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HIDDEN, WEIGHT, TARGETS = draw(N, D), draw(V, D, seed=1), torch.arange(N)


def objective(**changes):
    arguments = {"hidden": draw(2, 3, D), "head": WEIGHT, "targets": TARGETS.reshape(2, 3)}
    arguments |= {"ref_logp": -draw(2, 3).abs()} | changes
    return prefkern.preference_loss(**arguments)[0]


# ---- the objective -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_items",
    [{"pair": 4}, {"pairs": 0}, {"pairs": -1.0}, {"pairs": float("nan")}, {"pairs": "4"}, 4,
     {"pairs": torch.ones(2)}, {"pairs": True}],
    ids=str,
)  # fmt: skip
def test_denominators(num_items):
    with pytest.raises(ValueError, match="num_items"):
        objective(num_items=num_items)


def test_denominators_that_fit():
    want = objective() / 4  # one pair
    for count in (4, 4.0, torch.tensor(4)):
        torch.testing.assert_close(objective(num_items={"pairs": count, "tokens": 9}), want)


def test_a_transposed_reference():
    flat = -draw(2, 3).abs()
    assert objective(ref_logp=flat) == objective(ref_logp=flat.flatten())
    for wrong in (flat.T, flat[None], flat.reshape(6, 1)):
        with pytest.raises(ValueError, match="ref_logp must have the shape of targets"):
            objective(ref_logp=wrong)


# ---- boundaries, labels and counts beyond 32 bits ------------------------------------------------


def test_boundaries_beyond_32_bits():
    beyond = torch.tensor([0, HUGE + 3, 6])
    last = torch.tensor([0, 3, HUGE + 6])
    for cu in (beyond, last):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            prefkern.segment_sum(draw(N), cu)
        with pytest.raises(ValueError, match="cu_groups must"):
            prefkern.list_rank(draw(N), draw(N), cu, family="softmax")
        with pytest.raises(ValueError, match="cu_seqlens must"):
            prefkern.preference_loss(HIDDEN, WEIGHT, TARGETS, cu, loss="simpo")


def test_boundaries_beyond_32_bits_in_compiled_code():
    """Where values are not read before the op, they reach it as they are: out of range."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def total(values, cu):
        return prefkern.segment_sum(values, cu)

    torch.testing.assert_close(total(torch.ones(6), CU), torch.tensor([3.0, 3.0]).double())
    with pytest.raises(Exception, match="cu_seqlens must"):
        total(torch.ones(6), torch.tensor([0, 3, HUGE + 6]))


def test_segments_beyond_32_bits():
    args = (torch.ones(1, 3), torch.zeros(1, 3))
    for segment in (HUGE, 2, 2**62):
        with pytest.raises(ValueError, match="below num_segments = 2"):
            prefkern.error_sum(*args, segments=torch.tensor([0, 1, segment]), num_segments=2)
    left = prefkern.error_sum(*args, segments=torch.tensor([0, 1, -HUGE]), num_segments=2)
    assert left.err.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_relevance(value):
    relevance = torch.tensor([value, 0.0, 1.0, 2.0, 3.0, 4.0])
    for family in ("pair", "softmax", "plackett_luce"):
        with pytest.raises(ValueError, match="relevance must be finite"):
            prefkern.list_rank(draw(N), relevance, CU, family=family)


@pytest.mark.parametrize("k", [V, 2**31, 2**62, 2**63, 2**70])
def test_top_sets_larger_than_the_vocabulary(backend, k):
    args = (HIDDEN, WEIGHT, TARGETS, draw(N, D, seed=3))
    got = prefkern.linear_divergence(*args, stats=(f"bkl:{k}",), backend=backend).bkl
    want = prefkern.linear_divergence(*args, stats=("fkl",), backend=backend).fkl
    torch.testing.assert_close(got, want)


def test_counts_near_the_end_of_64_bits():
    args = {"family": "plackett_luce"}
    want = prefkern.list_rank(draw(N), draw(N), CU, **args)
    for topk in (2**31, 2**63 - 1, 2**70):
        torch.testing.assert_close(
            prefkern.list_rank(draw(N), draw(N), CU, topk=topk, **args), want
        )
    seq = prefkern.SeqStats(logp=-draw(N).abs().double(), ref_logp=-draw(N).abs().double())
    with pytest.raises(ValueError, match="sinkhorn_iters"):
        prefkern.losses.neural_ndcg(seq.logratio, draw(N).double(), CU, sinkhorn_iters=2**63 - 1)


def test_a_hidden_size_beyond_one_block(backend):
    """2 MiB of a row, where a block of the backward holds less than one."""
    if backend == "triton":
        pytest.skip("minutes in the interpreter")
    d = 524_289
    hidden, weight = draw(3, d), draw(4, d, seed=1) / d**0.5
    grads = []
    for dtype, where in ((torch.float32, backend), (torch.float64, "eager")):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        out = prefkern.linear_logps(*leaves, torch.tensor([0, 1, 3]), backend=where).logp
        grads.append(torch.autograd.grad(out.sum(), leaves))
    for got, want in zip(*grads, strict=True):
        assert (got.double() - want).norm() < 1e-3 * want.norm()


# ---- numbers and empty tensors -------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [{"scale": 1e300}, {"scale": 1e-300}, {"temperature": 1e-300},
                                     {"softcap": 1e300}, {"softcap": 1e-300}], ids=str)  # fmt: skip
def test_numbers_that_float32_cannot_hold(numbers):
    with pytest.raises(ValueError, match="must be between"):
        Head(WEIGHT, **numbers)
    if "temperature" in numbers:
        with pytest.raises(ValueError, match="must be between"):
            prefkern.logits_logps(draw(3, 5), TARGETS[:3], **numbers)


def test_empty_and_mistyped_arguments():
    none = torch.zeros(0, dtype=torch.long)
    assert prefkern.selective_log_softmax(torch.zeros(0, 5), none).shape == (0,)
    assert prefkern.selective_log_softmax(draw(3, 5), none.reshape(3, 0)).shape == (3, 0)
    with pytest.raises(ValueError, match="row_mask must be"):
        prefkern.selective_log_softmax(draw(3, 5), TARGETS[:3], row_mask=torch.ones(3))
    with pytest.raises(ValueError, match="stats must be"):
        prefkern.linear_logps(HIDDEN, WEIGHT, TARGETS, stats=None)
    for count in (6.0, True, -1):
        with pytest.raises(ValueError, match="num_scored must be"):
            prefkern.linear_logps(HIDDEN, WEIGHT, TARGETS, num_scored=count)
    nothing = (none.reshape(1, 0).expand(N, 0), torch.zeros(N, 0))
    with pytest.raises(ValueError, match="at least one entry"):
        prefkern.linear_logps(HIDDEN, WEIGHT, TARGETS, stats=("ev",), values=nothing)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                                    (torch.float32, torch.float64)], ids=str)  # fmt: skip
def test_a_wider_weight_is_cast_to_the_compute_dtype(backend, dtypes):
    hidden, weight = draw(N, 24).to(dtypes[0]), draw(V, 24, seed=1).to(dtypes[1])
    got, want = (
        prefkern.linear_logps(hidden, w, TARGETS, stats=("logp", "ent"), backend=backend)
        for w in (weight, weight.to(dtypes[0]))
    )
    assert torch.equal(got.logp, want.logp) and torch.equal(got.ent, want.ent)


def test_a_product_beyond_fp16_has_no_plausible_gradient(backend):
    hidden = torch.tensor([[300.0], [1.0]]).half().requires_grad_()
    weight = torch.tensor([[300.0], [1.0]]).half()
    out = prefkern.linear_logps(hidden, Head(weight), torch.tensor([0, 0]), backend=backend).logp
    out.sum().backward()
    assert out[1].isfinite() and hidden.grad[1].isfinite().all()
    assert out[0] == 0 or out[0].isnan()
    assert hidden.grad[0].isnan().all() or (hidden.grad[0] == 0).all()


# ---- derivatives that do not exist ---------------------------------------------------------------

FUNCTIONS = {
    "linear_logps": lambda x: prefkern.linear_logps(x, WEIGHT, TARGETS).logp,
    "linear_divergence": lambda x: prefkern.linear_divergence(x, WEIGHT, TARGETS, HIDDEN).fkl,
    "logits_logps": lambda x: prefkern.logits_logps(x, TARGETS % D).logp,
    "selective_log_softmax": lambda x: prefkern.selective_log_softmax(x, TARGETS % D),
    "segment_sum": lambda x: prefkern.segment_sum(x[:, 0], CU),
    "segment_sum_weights": lambda x: prefkern.segment_sum(HIDDEN[:, 0], CU, weights=x[:, 0]),
    "list_rank": lambda x: prefkern.list_rank(x[:, 0], draw(N), CU, family="softmax"),
    "error_sum": lambda x: prefkern.error_sum(x, HIDDEN).err,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_is_refused(name):
    """A custom op would drop the tangent: a derivative of 0 in silence."""
    f, direction = FUNCTIONS[name], torch.ones(N, D)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(f, (HIDDEN,), (direction,))
    with pytest.raises(RuntimeError, match="no forward-mode derivative"), forward_ad.dual_level():
        f(forward_ad.make_dual(HIDDEN, direction))
    with forward_ad.dual_level():  # a tangent elsewhere is nobody's
        assert torch.isfinite(f(HIDDEN)).all()


# ---- the native ops, called directly -------------------------------------------------------------

native = pytest.mark.skipif("cpu" not in backends_on(), reason="the native backend is off")
NUMBERS = [1.0, 0.0, 1.0] * 3
RECORD = ([HIDDEN, WEIGHT, TARGETS], NUMBERS, "logp;;;hidden,weight,targets", -100)


@native
@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (3, torch.zeros(1, N, V + 1)),
        (3, torch.zeros(2, N, V)),
        (3, torch.zeros(N, V)),
        (3, torch.zeros(1, N, V, dtype=torch.float64)),
        (3, torch.zeros(1, N, 2 * V)[..., ::2]),
        (2, torch.zeros(1, N, dtype=torch.float64)),
        (2, torch.zeros(3, N - 1, dtype=torch.float64)),
        (1, torch.zeros(1, N - 1)),
        (1, torch.zeros(2, N)),
        (0, torch.zeros(1, 2 * N)[:, ::2]),
    ],
)
def test_a_backward_of_wrong_shapes(place, wrong):
    ops = torch.ops.prefkern_native
    out, saved, cache, factors, _ = ops.forward(*RECORD, N)
    given = [torch.ones(1, N), out, saved, cache, factors]
    assert ops.backward(*RECORD, *given, "hidden,weight")[0].shape == (N, D)
    given[place] = wrong
    with pytest.raises(RuntimeError, match="must"):
        ops.backward(*RECORD, *given, "hidden,weight")


FROZEN = (*RECORD[:2], "logp,ent;;frozen;hidden,weight,targets", RECORD[3])


@native
@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (4, torch.zeros(1, N, D)),
        (4, torch.zeros(2, N, D - 1)),
        (4, torch.zeros(2, N, D, dtype=torch.float64)),
        (4, torch.zeros(2, N, 2 * D)[..., ::2]),
        (2, torch.zeros(3, N - 1, dtype=torch.float64)),
        (5, "hidden,weight"),
        (5, "hidden,hidden"),
    ],
)
def test_a_frozen_backward_of_wrong_shapes(place, wrong):
    ops = torch.ops.prefkern_native
    out, saved, cache, factors, _ = ops.forward(*FROZEN, 0)
    given = [torch.ones(2, N), out, saved, cache, factors, "hidden"]
    assert ops.backward(*FROZEN, *given)[0].shape == (N, D)
    given[place] = wrong
    with pytest.raises(RuntimeError, match=r"must|has no gradient|twice"):
        ops.backward(*FROZEN, *given)


@native
@pytest.mark.parametrize(
    "change",
    [
        {2: "jsd:0.5;;;hidden,weight,targets"},
        {2: "xent;;;hidden,weight,targets"},
        {2: "ev;;;hidden,weight,targets"},
        {2: "logp;;frozen,frozen;hidden,weight"},
        {2: "logp;;;hidden,weight,targets,rows"},
        {1: NUMBERS[:4]},
        {0: [HIDDEN[:, :2], WEIGHT, TARGETS]},
        {0: [HIDDEN, WEIGHT.double()[:, ::2], TARGETS]},
        {0: [HIDDEN, WEIGHT, TARGETS[:3]]},
        {0: [HIDDEN, WEIGHT, TARGETS.int()]},
        {0: [HIDDEN, WEIGHT, TARGETS + V]},
        {4: -1},
    ],
    ids=str,
)
def test_a_forward_of_wrong_records(change):
    args = [*RECORD, 0]
    for place, value in change.items():
        args[place] = value
    with pytest.raises(RuntimeError):
        torch.ops.prefkern_native.forward(*args)


@native
@pytest.mark.parametrize("topk", [0, -1, -(2**63)])
def test_list_rank_of_negative_stages(topk):
    args = (draw(N), draw(N), CU.int(), torch.tensor([topk, 1]), "plackett_luce", "")
    with pytest.raises(RuntimeError, match="topk must be"):
        torch.ops.prefkern_native.list_rank_fwd(*args)
