"""Token-level methods against tests/golden/token.json, from logits to logit gradients.

With the identity as head, hidden states are logits, so the vectors' logit gradients are d_hidden.
Every case of the file is proven here, in test_token_golden.py or in the tests of the ops.
"""

from __future__ import annotations

import pytest
import torch
import vectors
from token_cases import CASES, METHODS, RUN, Case, run, tight

from prefkern.objective.preference_loss import preference_loss

# Proven in test_token_golden.py (stages and pair losses) or with the ops (statistics).
ELSEWHERE = {
    "statistic", "DPO", "LD-DPO", "SimPO", "TDPO1", "TDPO2", "SparsePO", "MaPO", "TGDPO", "LN-DPO",
    "R-DPO",
}  # fmt: skip


def test_every_vector_is_used_or_proven_elsewhere():
    used = set(METHODS) | ELSEWHERE
    assert {c["method"] for c in CASES.values()} - used == {"D2O"}  # has a test of its own


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("name", "prepare"), RUN, ids=[f"{k}-{f.__name__}" for k, f in RUN])
def test_vector(name, prepare, dtype, backend):
    c = Case(name, dtype)
    prepare(c)
    loss = run(c, backend)
    assert loss.item() == pytest.approx(c.out["loss"], rel=tight(c) * 10, abs=tight(c))
    loss.backward()
    want = [row for n in c.names for row in c.out["grad_policy_logits"][n]]
    scale = max(1.0, max(abs(x) for row in want for x in row))
    vectors.assert_close("logits", c.hidden.grad, want, relative=tight(c) * 10, scale=scale)
    assert (c.hidden.grad[~c.scored] == 0).all()
    for key, right in c.out.get("grad_extra", {}).items():
        got = c.leaves["value" if key == "value0" else key].grad
        if key == "value0":  # read at the first scored token only
            assert (got[[0, 2, 3, 4]] == 0).all()
            got = got[1]
        vectors.assert_close(key, got.reshape(-1), vectors.tensor(right).reshape(-1).tolist(),
                             relative=tight(c) * 10, scale=1.0)  # fmt: skip


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_estimators(name, backend):
    case = CASES[f"stat_{name}"]
    c = Case(f"stat_{name}", torch.float64)
    loss, _ = preference_loss(
        c.hidden, torch.eye(5, dtype=torch.float64), c.labels, c.cu, loss="kl_penalty",
        estimator=name, ref_hidden=c.logits("ref"), backend=backend,
        num_items={"scored_tokens": 1},
    )  # fmt: skip
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-11)
    loss.backward()
    vectors.assert_close(
        "logits", c.hidden.grad, case["outputs"]["grad_policy_logits"]["chosen"], relative=1e-10
    )


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("stat_fkl_ref", {"divergence": "fkl"}),
        ("stat_rkl_ref", {"divergence": "rkl"}),
        ("stat_tv_ref", {"divergence": "tv"}),
        ("stat_alpha_0p5_ref", {"divergence": "alpha"}),
        ("stat_alpha_0p3_ref", {"divergence": "alpha", "order": 0.3}),
        ("stat_renyi_0p5_ref", {"divergence": "renyi"}),
        ("stat_bkl_3_ref", {"divergence": "bkl", "top_k": 3}),
        ("stat_fkl_ref", {"divergence": "alpha", "order": 1.0 - 1e-5}),
        ("stat_rkl_ref", {"divergence": "alpha", "order": 0.0}),
        ("stat_fkl_ref", {"divergence": "renyi", "order": 1.0}),
    ],
)
def test_divergences(name, given, backend):
    out = CASES[name]["outputs"]
    c = Case(name, torch.float64)
    loss, _ = preference_loss(
        c.hidden, torch.eye(5, dtype=torch.float64), c.labels, c.cu, loss="distill",
        ref_hidden=c.logits("ref"), backend=backend, num_items={"scored_tokens": 1}, **given,
    )  # fmt: skip
    assert loss.item() == pytest.approx(out["loss"], rel=1e-10)
    loss.backward()
    vectors.assert_close(
        "logits", c.hidden.grad, out["grad_policy_logits"]["chosen"], relative=1e-9, scale=1.0
    )
