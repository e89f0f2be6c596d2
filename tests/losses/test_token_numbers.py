"""Intermediate numbers of the token-level methods: weights, rewards, reductions, references."""

from __future__ import annotations

import pytest
import torch
import vectors
from token_cases import CASES, Case, grpo, run, tight, tree_tpo

from prefkern import linear_divergence, losses
from prefkern.losses import weights
from prefkern.losses.pairwise.adpa import advantage_rows
from prefkern.stats import SeqStats


def test_intermediate_numbers():
    for name in ("tisdpo", "tisdpo_kl"):
        c = Case(name, torch.float64)
        h = c.hyper
        sign = torch.where(torch.arange(10) < 5, 1.0, -1.0).double()
        got = weights.tisdpo(
            c.logp("aux1"), c.logp("aux2"), sign, c.scored, c.cu, k=h["k"], mu=h["mu"], L=h["L"],
            U=h["U"],
        )  # fmt: skip
        want = c.out["weights"]["chosen"] + c.out["weights"]["rejected"]
        vectors.assert_close("weights", got.weights, want, relative=1e-11)
    c = Case("tree_tpo", torch.float64)
    tree_tpo(c)
    stage = weights.tree_tpo(c.cu, c.scored, c.args["step_index"], c.args["cosine"])
    rho = stage.weights * (c.logp("policy") - c.logp("ref"))
    got = [0.5 * rho[a:b].sum() for a, b in zip(c.cu[:-1], c.cu[1:], strict=True)]
    vectors.assert_close("rewards", torch.stack(got), c.out["rewards"], relative=1e-10)


@pytest.mark.parametrize("aggregation", ["bnpo", "dapo", "dr_grpo"])
def test_grpo_reductions(aggregation):
    """Token means agree with the vector however the count is given."""
    c = Case("grpo_multiobjective_token", torch.float64)
    grpo(c)
    tokens = int(c.scored.sum())
    extra = {
        "bnpo": {}, "dapo": {"tokens_per_sequence": tokens / 4}, "dr_grpo": {"max_length": 10}
    }[aggregation]  # fmt: skip
    c.args |= {"aggregation": aggregation, **extra}
    loss = run(c, "auto")
    want = c.out["loss"] * (tokens / 40 if aggregation == "dr_grpo" else 1.0)
    assert loss.item() == pytest.approx(want, rel=1e-11)


def test_adpa_rows_of_the_released_code():
    """Top-k rows with and without the clamp; absent entries are 0, where the code has 1e-8."""
    for name in ("adpa_top3", "adpa_top3_clamped"):
        c = Case(name, torch.float64)
        index, value = advantage_rows(
            torch.log_softmax(c.logits("aux1"), -1), torch.log_softmax(c.logits("aux2"), -1),
            top_k=3, clamp=c.hyper["clamp"],
        )  # fmt: skip
        dense = torch.zeros(10, 5, dtype=torch.float64).scatter(1, index, value)
        want = [row for n in c.names for row in c.extra["vocab_vector_A"][n]]
        bound = 1e-11 if name == "adpa_top3" else 2e-8
        vectors.assert_close(name, dense, want, relative=bound, scale=1.0)
        c.args = dict(loss="adpa", values=(index, value))
        assert run(c, "auto").item() == pytest.approx(c.out["loss"], rel=bound)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
def test_d2o_has_two_references(dtype):
    """K = 2 self-samples over the more harmful reference, the rejected answer over the helpful."""
    c = Case("d2o", dtype, ("chosen", "third", "rejected"))
    logp, out = c.sums("policy").requires_grad_(), c.out
    harmful, helpful = c.sums("aux1"), c.sums("aux2")
    loss = losses.d2o(
        SeqStats(logp=logp[None, :2], ref_logp=harmful[None, :2]),
        SeqStats(logp=logp[2:], ref_logp=helpful[2:]),
        beta=c.hyper["beta"], alpha=c.hyper["alpha"],
    )  # fmt: skip
    assert loss.item() == pytest.approx(out["loss"], rel=tight(c) * 10)
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    stat = out["grad_per_token_stat"]
    want = [max(stat[n]["logp"], key=abs) for n in c.names]
    vectors.assert_close("logp", grad, want, relative=tight(c) * 10)
    # as one list of K + 1 answers, wherever the bad one stands, beside a list without any
    order, labels = [2, 0, 1, 0], torch.tensor([0.0, 1.0, 1.0, 1.0])
    scores = (logp - torch.cat([harmful[:2], helpful[2:]]))[order]
    cu = torch.tensor([0, 3, 4], dtype=torch.int32)
    found = losses.d2o_list(scores, labels, cu, beta=c.hyper["beta"], alpha=c.hyper["alpha"])
    assert found.tolist() == [pytest.approx(out["loss"], rel=tight(c) * 10), 0.0]
    (grad,) = torch.autograd.grad(found.sum(), logp)
    vectors.assert_close("logp", grad, want, relative=tight(c) * 10)


def test_mixture_statistic_of_ipo_md():
    """The answers are drawn from the mixture; its log-probabilities come from the same sweep."""
    c = Case("ipo_md_hard", torch.float64)
    head = torch.eye(5, dtype=torch.float64)
    stats = linear_divergence(
        c.hidden.detach(), head, torch.tensor(c.column("targets")), c.logits("ref"),
        stats=("mix:0.125",),
    )  # fmt: skip
    want = c.out["mixture_logp"]["chosen"] + c.out["mixture_logp"]["rejected"]
    vectors.assert_close("mix", stats.mix, want, relative=1e-11)


def test_vectors_of_unverified_formulas_belong_to_provisional_losses():
    """SparsePO's is the alternative reading of its KL, offered as a switch."""
    unproven = {c["method"] for c in CASES.values() if not c["verified_formula"]}
    assert unproven == {"SparsePO", "OFS-DPO", "SCIR", "BiAlign", "Tree-TPO"}
    provisional = {n for n, r in losses.LOSSES.items() if r.provisional}
    assert {
        "dpo_second_reference",
        "scir",
        "rank_gap_hinge",
        "tree_tpo",
        "set_contrast",
    } <= provisional
