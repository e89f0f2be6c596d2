"""Token-level methods against tests/golden/token.json, from logits to logit gradients.

With the identity as head, hidden states are logits, so the vectors' logit gradients are d_hidden.
Every case of the file is proven here, in test_token_golden.py or in the tests of the ops.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import vectors

from prefkern import advantages, contrast_weights, linear_divergence, losses
from prefkern.losses.pairwise.adpa import advantage_rows
from prefkern.losses.pairwise.infifpo import fused_reference
from prefkern.losses.pointwise import fdpg
from prefkern.objective import preference_loss
from prefkern.types import SeqStats

CASES = {c["id"]: c for c in vectors.load("token")["cases"]}
# Proven in test_token_golden.py (stages and pair losses) or with the ops (statistics).
ELSEWHERE = {
    "statistic", "DPO", "LD-DPO", "SimPO", "TDPO1", "TDPO2", "SparsePO", "MaPO", "TGDPO", "LN-DPO",
    "R-DPO",
}  # fmt: skip


class Case:
    """One case packed in the order of its sequences, with what its loss is called with."""

    def __init__(self, name: str, dtype: torch.dtype, order: tuple[str, ...] | None = None) -> None:
        self.case, self.dtype = CASES[name], dtype
        self.inputs, self.out = self.case["inputs"], self.case["outputs"]
        self.hyper, self.extra = dict(self.inputs["hparams"]), self.inputs["extra"]
        self.names = order or tuple(self.inputs["sequences"])
        self.sequences = [self.inputs["sequences"][n] for n in self.names]
        size = [len(s["mask"]) for s in self.sequences]
        self.cu = torch.tensor([0, *torch.tensor(size).cumsum(0).tolist()], dtype=torch.int32)
        self.labels = torch.tensor(self.column("labels"))
        self.scored = torch.tensor(self.column("mask")).bool()
        self.hidden = self.logits("policy").requires_grad_()
        self.args: dict = {"loss": None}
        self.leaves: dict[str, torch.Tensor] = {}

    def column(self, key: str) -> list:
        return [x for s in self.sequences for x in s[key]]

    def logits(self, model: str) -> torch.Tensor:
        return vectors.tensor(self.column(f"{model}_logits"), self.dtype)

    def logp(self, model: str) -> torch.Tensor:
        """[N] log-probability of each target, also of the masked ones."""
        table = torch.log_softmax(self.logits(model), -1)
        return table.gather(1, torch.tensor(self.column("targets"))[:, None])[:, 0]

    def sums(self, model: str) -> torch.Tensor:
        parts = torch.where(self.scored, self.logp(model), 0.0)
        return torch.stack(
            [parts[a:b].sum() for a, b in zip(self.cu[:-1], self.cu[1:], strict=True)]
        )

    def leaf(self, key: str, value: object) -> torch.Tensor:
        self.leaves[key] = vectors.tensor(value, self.dtype).requires_grad_()
        return self.leaves[key]

    def number(self, value: object) -> torch.Tensor:
        return vectors.tensor(value, self.dtype)


def group(c: Case) -> torch.Tensor:
    return torch.tensor([0, len(c.names)], dtype=torch.int32)


def tisdpo(c: Case) -> None:
    c.args = dict(
        loss="tisdpo", ref_hidden=c.logits("ref"), positive_logp=c.logp("aux1"),
        negative_logp=c.logp("aux2"), **c.hyper,
    )  # fmt: skip


def rto(c: Case) -> None:
    h = c.hyper
    reward = advantages.rto_rewards(
        c.logp("aux1"), c.logp("ref"), c.logp("old"), c.number([h["sequence_reward"]]), c.cu,
        c.scored, beta1=h["beta1"], beta2=h["beta2"], beta3=h["beta3"],
        dpo_reward_clip=h["dpo_reward_clip"],
    )  # fmt: skip
    old = c.number(c.extra["old_values"])
    advantage, returns = advantages.gae(
        reward, old, c.cu, c.scored, gamma=h["gamma"], lam=h["lambda"]
    )
    for key, got in (("token_reward", reward), ("advantage", advantage), ("return", returns)):
        vectors.assert_close(key, got, c.out[key], relative=tight(c) * 10)
    c.args = dict(
        loss="rto", advantages=advantage, returns=returns, old_values=old, old_logp=c.logp("old"),
        value_pred=c.leaf("value_pred", c.extra["value_pred"]), eps_clip=h["eps_clip"],
        value_clip=h["value_clip"],
    )  # fmt: skip


def grpo(c: Case) -> None:
    h = c.hyper
    components = c.number(c.extra["reward_components"])
    advantage = advantages.group_advantages(
        components, group(c), weights=h["weights"], std_eps=h["std_eps"],
        unbiased=h["std"] == "unbiased",
    )  # fmt: skip
    vectors.assert_close("advantages", advantage, c.out["advantages"], relative=tight(c) * 10)
    c.args = dict(
        loss="grpo", ref_hidden=c.logits("ref"), old_logp=c.logp("old"), advantages=advantage,
        eps=h["eps"], beta=h["beta"],
        aggregation={"grpo": "grpo", "token": "bnpo"}[h["aggregation"]],
    )  # fmt: skip


def trpa(c: Case) -> None:
    levels = torch.tensor(c.extra["preference_levels"])
    c.args = dict(
        loss="trpa", ref_hidden=c.logits("ref"), old_logp=c.logp("old"), cu_groups=group(c),
        preference_levels=levels, **c.hyper,
    )  # fmt: skip


def oreo(c: Case) -> None:
    h = c.hyper
    response = "value0" in c.extra
    value = c.leaf("value", c.extra.get("value", [0.0, c.extra.get("value0"), 9.0, 9.0, 9.0]))
    c.args = dict(
        loss="oreo", ref_hidden=c.logits("ref"), value=value, reward=c.number([h["reward"]]),
        beta=h["beta"], alpha=h["alpha"], level="response" if response else "token",
    )  # fmt: skip


def dckd(c: Case) -> None:
    c.args = dict(loss="dckd", ref_hidden=c.logits("aux1"), **c.hyper)


def adpa(c: Case) -> None:
    rows = c.number(
        [row for n in c.names for row in c.extra["vocab_vector_A"][n]]
    )  # [N, 5], dense here
    index = torch.arange(5).expand_as(rows)
    c.args = dict(
        loss="adpa", values=(index, rows), sft_on_chosen=c.hyper["sft_on_chosen"],
        adpa_weight=c.hyper["adpa_weight"],
    )  # fmt: skip


def adpa_fused(c: Case) -> None:
    """A formed from two heads in the tile."""
    c.args = dict(
        loss="adpa", ref_hidden=c.logits("aux2"), aux_hidden=c.logits("aux1"),
        aux_weight=torch.eye(5, dtype=c.dtype), sft_on_chosen=1.0, adpa_weight=1.0,
    )  # fmt: skip


def gkd(c: Case) -> None:
    c.args = dict(loss="gkd", ref_hidden=c.logits("aux1"), **c.hyper)


def entropy(c: Case) -> None:
    c.args = dict(loss="entropy_bonus", **c.hyper)


def bialign(c: Case) -> None:
    c.args = dict(
        loss="bialign", ref_hidden=c.logits("aux1"), cu_groups=group(c),
        labels=c.number(c.out["teacher_scores"]), lam=c.hyper["lambda"],
    )  # fmt: skip


def infifpo(c: Case) -> None:
    source = c.extra["source_mean_logps"]
    c.args = dict(
        loss="infifpo", ref_hidden=c.logits("ref"),
        source_chosen_mean_logps=c.number([source["chosen"]]),
        source_rejected_mean_logps=c.number([source["rejected"]]), **c.hyper,
    )  # fmt: skip
    for side in ("chosen", "rejected"):
        got = fused_reference(
            c.number([c.out["pivot_init"][side]]), c.number([source[side]]), side,
            c.hyper["fusion"],
        )  # fmt: skip
        vectors.assert_close(side, got, [c.out["fused_ref"][side]], relative=tight(c))


def poft(c: Case) -> None:
    c.args = dict(
        loss="poft", baseline_mean_logps=c.number([sum(c.extra["aligned_mean_logps"]) / 3])
    )


def tree_tpo(c: Case) -> None:
    step = [k for n in c.names for k in c.extra["step_index"][n]]
    cosine = [
        c.extra["cosine_to_best_step"][n][k - 1]
        if 1 <= k <= len(c.extra["cosine_to_best_step"][n])
        else 0.0
        for n in c.names
        for k in c.extra["step_index"][n]
    ]
    c.args = dict(
        loss="tree_tpo", ref_hidden=c.logits("ref"), cu_groups=group(c),
        labels=c.number(c.extra["scores"]), step_index=torch.tensor(step),
        cosine=c.number(cosine), **c.hyper,
    )  # fmt: skip


def f_dpg(c: Case) -> None:
    target = c.number(c.extra["log_target_prob"])
    got = fdpg.advantages(c.sums("policy"), target, c.hyper["divergence"]) - c.hyper["baseline"]
    vectors.assert_close("advantage", got, c.out["advantage"], relative=tight(c) * 10)
    c.args = dict(loss="fdpg", log_target_prob=target, proposal_logp=c.sums("old"), **c.hyper)


def ipo_md(c: Case) -> None:
    given = {k: v for k, v in c.hyper.items() if k != "mix_beta"}  # the mixture only draws answers
    c.args = dict(loss="ipo_md", ref_hidden=c.logits("ref"), **given)


def second_reference(c: Case) -> None:
    slow = c.sums("aux1")
    c.args = dict(
        loss="dpo_second_reference", ref_hidden=c.logits("ref"), slow_chosen_logps=slow[:1],
        slow_rejected_logps=slow[1:], **c.hyper,
    )  # fmt: skip


def scir(c: Case) -> None:
    c.args = dict(
        loss="scir", ref_hidden=c.logits("ref"), beta=c.hyper["beta"], lam=c.hyper["lambda"],
        lambda_entropy=c.hyper["lambda_entropy"],
        judge_logit_gap=c.leaf("judge_logit_gap", [c.extra["judge_logit_gap"]]),
    )  # fmt: skip


METHODS = {
    "TIS-DPO": tisdpo, "RTO": rto, "GRPO-MO": grpo, "TRPA": trpa, "OREO": oreo, "DCKD": dckd,
    "ADPA": adpa, "GKD": gkd, "entropy": entropy, "BiAlign": bialign, "InfiFPO": infifpo,
    "PoFT": poft, "Tree-TPO": tree_tpo, "f-DPG": f_dpg, "IPO-MD": ipo_md,
    "OFS-DPO": second_reference, "SCIR": scir,
}  # fmt: skip
RUN = [(k, METHODS[c["method"]]) for k, c in CASES.items() if c["method"] in METHODS]
RUN.append(("adpa", adpa_fused))


def tight(c: Case) -> float:
    return 1e-10 if c.dtype == torch.float64 else 1e-5


def test_every_vector_is_used_or_proven_elsewhere():
    used = set(METHODS) | ELSEWHERE
    assert {c["method"] for c in CASES.values()} - used == {"D2O"}  # has a test of its own


def run(c: Case, backend: str) -> torch.Tensor:
    head = torch.eye(5, dtype=c.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # provisional ones
        loss, metrics = preference_loss(c.hidden, head, c.labels, c.cu, backend=backend, **c.args)
    assert all(torch.isfinite(v) for v in metrics.values())
    return loss


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


def test_intermediate_numbers():
    for name in ("tisdpo", "tisdpo_kl"):
        c = Case(name, torch.float64)
        h = c.hyper
        sign = torch.where(torch.arange(10) < 5, 1.0, -1.0).double()
        got = contrast_weights.tisdpo(
            c.logp("aux1"), c.logp("aux2"), sign, c.scored, c.cu, k=h["k"], mu=h["mu"], L=h["L"],
            U=h["U"],
        )  # fmt: skip
        want = c.out["weights"]["chosen"] + c.out["weights"]["rejected"]
        vectors.assert_close("weights", got.weights, want, relative=1e-11)
    c = Case("tree_tpo", torch.float64)
    tree_tpo(c)
    stage = contrast_weights.tree_tpo(c.cu, c.scored, c.args["step_index"], c.args["cosine"])
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


def test_provisional_losses_warn_once_when_bound():
    losses._warned.discard("scir")
    with pytest.warns(UserWarning, match="provisional"):
        losses.bind(losses.LOSSES["scir"], {}, supplied=("judge_logit_gap",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses.bind(losses.LOSSES["scir"], {}, supplied=("judge_logit_gap",))
        losses.bind(losses.LOSSES["dpo"], {})
    unproven = {c["method"] for c in CASES.values() if not c["verified_formula"]}
    assert unproven == {"SparsePO", "OFS-DPO", "SCIR", "BiAlign", "Tree-TPO"}
    provisional = {n for n, r in losses.LOSSES.items() if r.status.startswith("provisional")}
    assert {"dpo_second_reference", "scir", "bialign", "tree_tpo", "set_contrast"} <= provisional
