"""The listwise losses against tests/golden/list.json: values and gradients."""

from __future__ import annotations

import functools

import pytest
import torch
import vectors
from cases import FP32, FP64, backends_on

from prefkern import losses, use_backend

pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")

# Vectors of the losses that list_rank serves: these run on every backend.
NATIVE = ("pair_logistic", "list_mle", "sdpo", "softmax")
RENAMED = {"weights": {None: "pair", "labeldiff": "labeldiff", "lambda": "lambda"}}


def _lipo(params: dict) -> functools.partial:
    rest = {k: v for k, v in params.items() if k != "weights"}
    return functools.partial(losses.lipo, variant=RENAMED["weights"][params.get("weights")], **rest)


def _same_name(name: str, **fixed: object):
    return lambda p: functools.partial(losses.LOSSES[name], **{**fixed, **p})


def _topk(name: str):
    """topk as a tensor, which is how lists of their own K come."""

    def call(params: dict) -> functools.partial:
        rest = dict(params)
        if isinstance(rest.get("topk"), list):
            rest["topk"] = torch.tensor(rest["topk"])
        return functools.partial(losses.LOSSES[name], **rest)

    return call


def _soft_pairs(params: dict):
    """The vectors count items from the start of their group."""

    def call(s, y, cu):
        named = [
            (i + int(start), j + int(start), q)
            for start, group in zip(cu, params["pairs"], strict=False)
            for i, j, q in group
        ]
        where = torch.tensor([(i, j) for i, j, _ in named])
        q = torch.tensor([q for *_, q in named], dtype=s.dtype)
        return losses.soft_pairs(s, y, cu, pairs=where, pref_prob=q, beta=params["beta"])

    return call


CALLS = {
    "pair_logistic": _lipo,
    "pair_hinge": _same_name("pair_hinge"),
    "point_mse": _same_name("point_mse"),
    "point_sigmoid": _same_name("point_sigmoid"),
    "list_mle": _topk("list_mle"),
    "sdpo": _same_name("sdpo"),
    "softmax": _same_name("softmax"),
    "nca": _same_name("nca"),
    "pro": _same_name("pro", sft_weight=0.0),
    "rrhf": _same_name("rrhf", sft_weight=0.0),
    "knowpat": _same_name("knowpat", sft_weight=0.0, knowpat_weight=1.0),
    "set_contrast": _same_name("set_contrast"),
    "approx_ndcg": _same_name("approx_ndcg"),
    "neural_ndcg": _same_name("neural_ndcg"),
    "rank_gap_hinge": _same_name("rank_gap_hinge"),
    "soft_pairs": _soft_pairs,
}
# The same vectors through a second name of the same formula.
ALSO = {
    "list_mle": [_topk("plackett_luce")],
    "sdpo": [_same_name("plackett_luce", topk=1, ties="stable")],
    "pair_hinge": [_same_name("lipo", variant="hinge")],
}
CASES = [c for c in vectors.load("list")["list_cases"] if c["loss"] in CALLS]
# Triton's kernels are fp64, and tests/kernels covers what rounds: fp32 there is seconds saved.
RUNS = [
    (case, dtype, backend)
    for case in CASES
    for backend in (backends_on() if case["loss"] in NATIVE else ("auto",))
    for dtype in ((FP64,) if backend == "triton" else (FP64, FP32))
]


def _id(case):
    if not isinstance(case, dict):
        return str(case).removeprefix("torch.")
    params = "-".join(f"{k}={v}" for k, v in case["params"].items() if k != "beta")
    return f"{case['loss']}-{case['dataset']}-{params}"


def test_every_vector_is_used_or_named():
    named = {c["loss"] for c in vectors.load("list")["list_cases"]}
    assert named == set(CALLS)


def inputs(case: dict, dtype: torch.dtype):
    """Summed log-probs (a leaf), scores, relevance, boundaries of a case."""
    data = vectors.load("list")["datasets"][case["dataset"]]
    logp = vectors.tensor(data["logp"], dtype).requires_grad_()
    relevance = vectors.tensor([float("nan") if y is None else y for y in data["labels"]], dtype)
    if case["score"] == "ref_ratio":
        scores = logp - vectors.tensor(data["ref_logp"], dtype)
    else:
        scores = logp / vectors.tensor(data["lengths"], dtype)
    return logp, scores, relevance, torch.tensor(data["offsets"], dtype=torch.int32)


def _tolerance(case: dict, dtype: torch.dtype) -> float:
    """fp64: the vectors subtract log-normalisers of scores up to 1e4, which costs them 2e-12.
    fp32: 1e-5, cold soft ranks and huge margins 1e-4."""
    if dtype == FP64:
        return 1e-11
    cold = case["loss"] == "approx_ndcg" and case["params"]["temperature"] < 1
    return 1e-4 if cold or case["dataset"] == "huge_margins" else 1e-5


@pytest.mark.parametrize(("case", "dtype", "on"), RUNS, ids=_id)
def test_vectors(case, dtype, on):
    with use_backend(on):
        for make in (CALLS[case["loss"]], *ALSO.get(case["loss"], [])):
            check(case, dtype, make(case["params"]))


def check(case, dtype, call):
    logp, scores, relevance, cu = inputs(case, dtype)
    loss = call(scores, relevance, cu)
    relative = _tolerance(case, dtype)
    want = case["loss_per_group"]
    assert loss.dtype == dtype
    for g, (got, right) in enumerate(zip(loss.tolist(), want, strict=True)):
        assert got == pytest.approx(right, rel=relative, abs=relative), f"group {g}"
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    for g in range(len(want)):
        rows = slice(cu[g], cu[g + 1])
        right = case["grad_sum_logp"][rows]
        if right:
            scale = max(max(map(abs, right)), 1e-12)
            vectors.assert_close(
                f"gradient of group {g}", grad[rows], right, relative=relative, scale=scale
            )
