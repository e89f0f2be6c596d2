"""Pairwise and unpaired losses against tests/golden/pair.json: values, gradients, metrics."""

from __future__ import annotations

import inspect

import pytest
import torch
import vectors

from prefkern import losses
from prefkern.losses.pairwise import beta_dpo, lcpo, madpo
from prefkern.losses.pointwise.bco import BcoState
from prefkern.losses.pointwise.bco import update as bco_update
from prefkern.losses.pointwise.kto import kl_baseline
from prefkern.stats import SeqStats

# Vectors of losses that are not there yet. A loss that appears must leave this list.
NOT_THERE: set[str] = set()
# Rewards that are not the vectors': TRL logs beta times the summed log-ratio of ipo and ln_dpo,
# where the vectors take the mean; a reward of one side alone cannot know the other objectives'
# rewards (modpo) or which side it is (flex_dpo).
OTHER_REWARDS = {"ipo", "ln_dpo", "modpo", "flex_dpo"}
DTYPES = {torch.float64: (1e-12, 1e-12), torch.float32: (2e-6, 2e-5)}  # loss, gradient
LOOSE_FP32 = {"apo_down": 1e-4}  # subtracts two nearly equal numbers


def test_every_vector_is_used_or_named():
    named = {c["loss"] for c in vectors.load("pair")["cases"]}
    assert named - set(losses.LOSSES) == NOT_THERE


def _id(case):
    return case["id"] if isinstance(case, dict) else str(case).removeprefix("torch.")


def of(*names):
    return [c for c in vectors.load("pair")["cases"] if c["loss"] in names]


def _check(case, dtype, items, total, leaves):
    rel_loss, rel_grad = DTYPES[dtype]
    if dtype == torch.float32:
        rel_grad = LOOSE_FP32.get(case["loss"], rel_grad)
    out = case["outputs"]
    vectors.assert_close(
        "per_item", items, out["per_item"], relative=rel_loss,
        scale=1.0 + max(map(abs, out["per_item"])),
    )  # fmt: skip
    vectors.assert_close(
        "loss", total, out["loss"], relative=rel_loss, scale=1.0 + abs(out["loss"])
    )  # fmt: skip
    names = list(out["grads"])
    grads = torch.autograd.grad(total, [leaves[n] for n in names], allow_unused=True)
    largest = max(vectors.tensor(out["grads"][n]).abs().max().item() for n in names)
    for name, grad in zip(names, grads, strict=True):
        grad = torch.zeros_like(leaves[name]) if grad is None else grad
        vectors.assert_close(
            name, grad, out["grads"][name], relative=rel_grad, scale=max(largest, 1e-30)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize(
    "case", [c for c in vectors.pair_cases(("pairwise",)) if c["loss"] != "d2o"], ids=_id
)
def test_pairwise(case, dtype):
    record = losses.LOSSES[case["loss"]]
    given = vectors.split(record, case, dtype)
    bound = losses.bind(record, given)
    sides = {name: vectors.rows(case, name, dtype) for name in record.rows}
    positional = [
        sides[name]
        for name, p in inspect.signature(record.fn).parameters.items()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    items = record(*positional, **bound.args)
    # beta-DPO's mean runs over the pairs it keeps
    total = items.sum() / max(given["keep"].sum(), 1.0) if "keep" in given else items.mean()
    if bound.supervised:
        term = record.supervised
        total = total + bound.supervised * vectors.supervised(sides[term.rows], term.mode)
    _check(case, dtype, items, total, {f"{name}_logps": seq.logp for name, seq in sides.items()})
    if dtype == torch.float64 and record.name not in OTHER_REWARDS:
        rewards = {n: record.rewards(sides[n], **bound.hyper) for n in ("chosen", "rejected")}
        metrics = case["outputs"]["metrics"]
        for name, value in rewards.items():
            assert value.mean().item() == pytest.approx(
                metrics[f"rewards/{name}"], rel=1e-12, abs=1e-12
            )
        accuracy = (rewards["chosen"] > rewards["rejected"]).double().mean().item()
        assert accuracy == metrics["rewards/accuracies"]


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("case", of("d2o"), ids=_id)
def test_d2o(case, dtype):
    names = {
        "chosen": ("self_logps", "ref_neg_self_logps"),
        "rejected": ("rejected_logps", "ref_pos_rejected_logps"),
    }
    sides = {
        side: SeqStats(
            logp=vectors.tensor(case["inputs"][logp], dtype).requires_grad_(),
            ref_logp=vectors.tensor(case["inputs"][ref], dtype),
        )
        for side, (logp, ref) in names.items()
    }
    items = losses.d2o(sides["chosen"], sides["rejected"], **case["params"])
    leaves = {"self_logps": sides["chosen"].logp, "rejected_logps": sides["rejected"].logp}
    _check(case, dtype, items, items.mean(), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("case", of("bco"), ids=_id)
def test_bco(case, dtype):
    record, seq, out = losses.LOSSES["bco"], vectors.rows(case, "", dtype), case["outputs"]
    params = dict(case["params"])
    before = BcoState(params.pop("mean"), params.pop("count"))
    state = bco_update(before, seq, **params)
    assert state.count == out["aux"]["count_new"]
    assert state.mean == pytest.approx(out["aux"]["delta"], rel=1e-5, abs=1e-6)
    label = vectors.tensor(case["inputs"]["label"]).bool()
    items = record(seq, desirable=label, delta=state.mean, **params)
    _check(case, dtype, items, items.mean(), {"logps": seq.logp})
    # One batch in two halves leaves the same state.
    half = len(label) // 2
    twice = bco_update(
        bco_update(before, seq.index(slice(0, half)), **params),
        seq.index(slice(half, None)),
        **params,
    )
    assert twice.count == state.count and twice.mean == pytest.approx(
        state.mean, rel=1e-6, abs=1e-9
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("case", of("poft"), ids=_id)
def test_poft(case, dtype):
    record, seq = losses.LOSSES["poft"], vectors.rows(case, "", dtype)
    seq = seq._replace(length=vectors.tensor(case["inputs"]["len"], dtype))
    items = record(seq, **vectors.split(record, case, dtype))
    _check(case, dtype, items, items.mean(), {"logps": seq.logp})


@pytest.mark.parametrize("case", of("lcpo"), ids=_id)
def test_lcpo_state(case):
    chosen, rejected = (vectors.rows(case, n, torch.float64) for n in ("chosen", "rejected"))
    params, aux = case["params"], case["outputs"]["aux"]
    contrast = params["beta"] * (chosen.logratio - rejected.logratio)
    vectors.assert_close(
        "weight", lcpo.posterior(contrast, params["eta"]), aux["weight"], relative=1e-12
    )
    options = {k: params[k] for k in ("beta", "base", "ema")}
    eta = lcpo.update(params["eta"], chosen, rejected, **options)
    assert eta == pytest.approx(aux["eta_new"], rel=1e-12)


@pytest.mark.parametrize("case", of("beta_dpo"), ids=_id)
def test_beta_dpo_state(case):
    chosen, rejected = (vectors.rows(case, n, torch.float64) for n in ("chosen", "rejected"))
    before = beta_dpo.BetaState(mean=case["params"]["gap_mean"])
    state = beta_dpo.update(before, chosen, rejected, ema=case["params"]["ema"])
    assert state.mean == pytest.approx(case["outputs"]["aux"]["gap_mean_new"], rel=1e-12, abs=1e-15)
    generator = torch.Generator().manual_seed(3)
    kept = beta_dpo.select(chosen, rejected, state, generator=generator)
    n = len(case["inputs"]["keep"])
    assert kept.sum().item() == (n if state.std == 0 else int(0.8 * n))


@pytest.mark.parametrize("case", of("madpo"), ids=_id)
def test_madpo_weight(case):
    p = case["params"]
    got = madpo.pair_weight(
        vectors.tensor(case["inputs"]["rm_margin"]), p["c_max"], p["c_min"], p["lam"], p["tau"]
    )
    vectors.assert_close("weight", got, case["outputs"]["aux"]["weight"], relative=1e-12)


@pytest.mark.parametrize("case", of("kto", "apo_zero"), ids=_id)
def test_apo_zero_is_kto_without_a_baseline(case):
    if case["loss"] == "kto":
        seq = vectors.rows(case, "", torch.float64)
        label = vectors.tensor(case["inputs"]["label"]).bool()
        want = losses.kto(seq, desirable=label, kl_baseline=0.0, beta=0.3)
        assert torch.equal(losses.apo_zero_unpaired(seq, desirable=label, beta=0.3), want)
        return
    sides = [vectors.rows(case, n, torch.float64) for n in ("chosen", "rejected")]
    label = torch.ones(len(sides[0].logp)).bool()
    parts = [
        losses.apo_zero_unpaired(s, desirable=y, beta=0.1)
        for s, y in zip(sides, (label, ~label), strict=True)
    ]
    vectors.assert_close("sum", parts[0] + parts[1], case["outputs"]["per_item"], relative=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("case", of("kto"), ids=_id)
def test_kto(case, dtype):
    kto = losses.LOSSES["kto"]
    seq = vectors.rows(case, "", dtype)
    inputs = case["inputs"]
    mismatched = seq._replace(
        logp=vectors.tensor(inputs["kl_logps"], dtype),
        ref_logp=vectors.tensor(inputs["kl_ref_logps"], dtype),
    )
    if len(inputs["label"]) == 1:
        with pytest.warns(UserWarning, match="single row"):
            baseline = kl_baseline(mismatched)
    else:
        baseline = kl_baseline(mismatched)
    assert baseline.item() == pytest.approx(case["outputs"]["aux"]["kl"], rel=1e-5, abs=1e-6)
    items = kto(
        seq,
        desirable=vectors.tensor(inputs["label"]).bool(),
        kl_baseline=baseline,
        **vectors.split(kto, case, dtype),
    )
    _check(case, dtype, items, items.mean(), {"logps": seq.logp})
