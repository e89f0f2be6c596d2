"""Cases of golden/token.json as packed batches, and one call of every token-level method.

With the identity as head, hidden states are logits, so the vectors' logit gradients are d_hidden.
"""

from __future__ import annotations

import warnings

import torch
import vectors

from prefkern.losses import advantages
from prefkern.losses.pairwise.infifpo import fused_reference
from prefkern.losses.pointwise import fdpg
from prefkern.objective.preference_loss import preference_loss

CASES = {c["id"]: c for c in vectors.load("token")["cases"]}


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


def tight(c: Case) -> float:
    return 1e-10 if c.dtype == torch.float64 else 1e-5


def run(c: Case, backend: str) -> torch.Tensor:
    head = torch.eye(5, dtype=c.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # provisional ones
        loss, metrics = preference_loss(c.hidden, head, c.labels, c.cu, backend=backend, **c.args)
    assert all(torch.isfinite(v) for v in metrics.values())
    return loss


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
        aux_head=torch.eye(5, dtype=c.dtype), sft_on_chosen=1.0, adpa_weight=1.0,
    )  # fmt: skip


def gkd(c: Case) -> None:
    c.args = dict(loss="gkd", ref_hidden=c.logits("aux1"), **c.hyper)


def entropy(c: Case) -> None:
    c.args = dict(loss="entropy_bonus", **c.hyper)


def bialign(c: Case) -> None:
    """An early reading of its ranking term, which is rank_gap_hinge; the KL of the first sequence
    alone is an average over its tokens."""
    first = torch.arange(c.scored.numel()) < int(c.cu[1])
    c.args = dict(
        loss=["rank_gap_hinge", "distill"], loss_weights=[c.hyper["lambda"], 1.0],
        ref_hidden=c.logits("aux1"), cu_groups=group(c), per_item=True,
        relevance=c.number(c.out["teacher_scores"]),
        token_weights={"fkl": first.to(c.dtype)},
        num_items={"scored_tokens": int((first & c.scored).sum())},
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
        relevance=c.number(c.extra["scores"]), step_index=torch.tensor(step),
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
