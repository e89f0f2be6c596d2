"""The float64 vectors of golden/token.json, through both ways into the statistics.

linear_divergence sees the logits as hidden states of an identity head, logits_logps as they are.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch

import prefkern

VECTORS = [
    case
    for case in json.loads((Path(__file__).parents[1] / "golden" / "token.json").read_text())[
        "cases"
    ]
    if case["method"] == "statistic"
]
STAT = {
    "stat_logp": "logp",
    "stat_lse": "lse",
    "stat_zy": "zy",
    "stat_ent": "ent",
    "stat_col": "col",
    "stat_fkl_ref": "fkl",
    "stat_rkl_ref": "rkl",
    "stat_jsd_0p5_ref": "jsd:0.5",
    "stat_jsd_0p1_ref": "jsd:0.1",
    "stat_alpha_0p5_ref": "alpha:0.5",
    "stat_alpha_0p3_ref": "alpha:0.3",
    "stat_renyi_0p5_ref": "renyi:0.5",
    "stat_tv_ref": "tv",
    "stat_bkl_3_ref": "bkl:3",
    "stat_mix_0p125_ref": "mix:0.125",
    "stat_ev_A": "ev",
}
ONE_MODEL = ("logp", "lse", "zy", "ent", "col")
K_ESTIMATORS = {
    "stat_k1": lambda d: d,
    "stat_k2": lambda d: d * d / 2,
    "stat_k3": lambda d: torch.expm1(-d) + d,
}


def read(case, name):
    """(logits, ref_logits, labels, wanted per-token value of the scored rows, wanted d logits)."""
    sequence = case["inputs"]["sequences"][name]
    logits, ref = (
        torch.tensor(sequence[k], dtype=torch.float64) for k in ("policy_logits", "ref_logits")
    )
    labels = torch.tensor(sequence["labels"])
    (per_token,) = (v for k, v in case["outputs"]["per_token"][name].items() if k != "ref_logp")
    return (
        logits,
        ref,
        labels,
        torch.tensor(per_token, dtype=torch.float64),
        torch.tensor(case["outputs"]["grad_policy_logits"][name], dtype=torch.float64),
    )


def test_every_statistic_vector_is_used():
    assert {c["id"] for c in VECTORS} == set(STAT) | set(K_ESTIMATORS)


def entries(case):
    """The ops that offer a statistic."""
    field = STAT[case["id"]].partition(":")[0]
    yield "linear_divergence"
    if field != "ev":
        yield "logits_logps"
    if field in ONE_MODEL:
        yield "linear_logps"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    ("case", "entry"),
    [
        pytest.param(c, e, id=f"{c['id']}-{e}")
        for c in VECTORS
        if c["id"] in STAT
        for e in entries(c)
    ],
)
def test_statistic(backend, case, entry, dtype):
    stat = STAT[case["id"]]
    field = stat.partition(":")[0]
    one_model = field in ONE_MODEL
    total = 0.0
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name in case["inputs"]["sequences"]:
        logits, ref, labels, want, d_logits = read(case, name)
        z = logits.to(dtype).requires_grad_()
        if entry == "logits_logps":
            refs = {} if one_model else {"ref_logits": ref.to(dtype)}
            out = prefkern.logits_logps(z, labels, stats=(stat,), backend=backend, **refs)
        elif entry == "linear_logps":
            out = prefkern.linear_logps(
                z, torch.eye(5, dtype=dtype), labels, stats=(stat,), backend=backend
            )
        else:
            values = {}
            if field == "ev":
                # the vectors give A per row: the sparse form with every entry listed
                table = torch.tensor(case["inputs"]["extra"]["vocab_vector_A"][name], dtype=dtype)
                values = {"values": (torch.arange(5).expand(table.shape), table)}
            out = prefkern.linear_divergence(
                z,
                torch.eye(5, dtype=dtype),
                labels,
                ref.to(dtype),
                torch.eye(5, dtype=dtype),
                stats=(stat,),
                backend=backend,
                **values,
            )
        value = getattr(out, field)
        scored = labels != -100
        torch.testing.assert_close(
            value[scored].double(),
            want[scored].double(),
            rtol=0,
            atol=tolerance,
            msg=lambda m: f"{stat}: {m}",
        )
        assert bool((value[~scored] == 0).all())
        value.sum().backward()
        torch.testing.assert_close(z.grad.double(), d_logits.double(), rtol=0, atol=tolerance)
        total += value.sum().item()
    assert total == pytest.approx(case["outputs"]["loss"], abs=10 * tolerance)


@pytest.mark.parametrize(
    "case", [c for c in VECTORS if c["id"] in K_ESTIMATORS], ids=lambda c: c["id"]
)
def test_k_estimators_are_functions_of_logp(backend, case):
    for name in case["inputs"]["sequences"]:
        sequence = case["inputs"]["sequences"][name]
        logits, ref = (
            torch.tensor(sequence[k], dtype=torch.float64) for k in ("policy_logits", "ref_logits")
        )
        labels = torch.tensor(sequence["labels"])
        logits.requires_grad_()
        out = prefkern.logits_logps(
            logits, labels, ref_logits=ref, stats=("logp", "ref_logp"), backend=backend
        )
        estimate = K_ESTIMATORS[case["id"]](out.logp - out.ref_logp)
        want = torch.tensor(case["outputs"]["estimator_per_token"], dtype=torch.float64)
        scored = labels != -100
        torch.testing.assert_close(estimate[scored], want[scored], rtol=0, atol=1e-12)
        estimate.sum().backward()
        torch.testing.assert_close(
            logits.grad,
            torch.tensor(case["outputs"]["grad_policy_logits"][name], dtype=torch.float64),
            rtol=0,
            atol=1e-12,
        )


@pytest.mark.parametrize("case", [c for c in VECTORS if c["id"] in STAT], ids=lambda c: c["id"])
def test_the_oracle_reproduces_the_vectors(case):
    """Two independent writings of the formulas agree, so the oracle can judge the rest."""
    stat = STAT[case["id"]]
    for name in case["inputs"]["sequences"]:
        logits, ref, labels, want, d_logits = read(case, name)
        values = case["inputs"]["extra"].get("vocab_vector_A", {}).get(name)
        ones = {stat: np.ones(labels.numel())}
        got, dz, _ = oracles.token_stats(
            logits,
            labels.numpy(),
            (stat,),
            zr=ref,
            upstream=ones,
            values=None if values is None else np.array(values),
        )
        scored = (labels != -100).numpy()
        np.testing.assert_allclose(got[stat][scored], want.double().numpy()[scored], atol=1e-13)
        np.testing.assert_allclose(dz, d_logits.double().numpy(), atol=1e-13)
