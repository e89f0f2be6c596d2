"""list_rank and the listwise losses against tests/golden/list.json: values and gradients."""

from __future__ import annotations

import functools

import pytest
import torch
import vectors

from prefkern import losses
from prefkern.ops.list_rank import list_rank

# Vectors of losses that are not there yet. A loss that appears must leave this list.
NOT_THERE = {
    "approx_ndcg", "point_mse", "point_sigmoid", "set_contrast", "neural_ndcg", "rrhf", "knowpat",
    "rank_gap_hinge", "soft_pairs",
}  # fmt: skip
RENAMED = {"weights": {None: "pair", "labeldiff": "labeldiff", "lambda": "lambda"}}


def _lipo(params: dict) -> functools.partial:
    rest = {k: v for k, v in params.items() if k != "weights"}
    return functools.partial(losses.lipo, variant=RENAMED["weights"][params.get("weights")], **rest)


def _family(family: str, params: dict) -> functools.partial:
    rest = {k: v for k, v in params.items() if k != "beta"}
    beta = params["beta"]
    return lambda s, y, cu: list_rank(beta * s, y, cu, family=family, **rest)


def _plackett_luce(params: dict) -> functools.partial:
    rest = dict(params)
    if isinstance(rest.get("topk"), list):
        rest["topk"] = torch.tensor(rest["topk"])
    return functools.partial(losses.plackett_luce, **rest)


CALLS = {
    "pair_logistic": _lipo,
    "pair_hinge": lambda p: functools.partial(losses.lipo, variant="hinge", **p),
    "list_mle": _plackett_luce,
    "sdpo": lambda p: functools.partial(losses.plackett_luce, topk=1, ties="stable", **p),
    "softmax": functools.partial(_family, "softmax"),
    "nca": functools.partial(_family, "nca"),
    "pro": lambda p: functools.partial(losses.pro, sft_weight=0.0, **p),
}
CASES = [c for c in vectors.load("list")["list_cases"] if c["loss"] in CALLS]


def _id(case):
    if not isinstance(case, dict):
        return str(case).removeprefix("torch.")
    params = "-".join(f"{k}={v}" for k, v in case["params"].items() if k != "beta")
    return f"{case['loss']}-{case['dataset']}-{params}"


def test_every_vector_is_used_or_named():
    named = {c["loss"] for c in vectors.load("list")["list_cases"]}
    assert named - set(CALLS) == NOT_THERE


def inputs(case: dict, dtype: torch.dtype):
    """Summed log-probs (a leaf), scores, labels, boundaries of a case."""
    data = vectors.load("list")["datasets"][case["dataset"]]
    logp = vectors.tensor(data["logp"], dtype).requires_grad_()
    labels = vectors.tensor([float("nan") if y is None else y for y in data["labels"]], dtype)
    if case["score"] == "ref_ratio":
        scores = logp - vectors.tensor(data["ref_logp"], dtype)
    else:
        scores = logp / vectors.tensor(data["lengths"], dtype)
    return logp, scores, labels, torch.tensor(data["offsets"], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=_id)
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_vectors(case, dtype):
    logp, scores, labels, cu = inputs(case, dtype)
    loss = CALLS[case["loss"]](case["params"])(scores, labels, cu)
    # fp64: the vectors subtract log-normalisers of scores up to 1e4, which costs them 2e-12
    relative = 1e-11 if dtype == torch.float64 else 1e-5
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
