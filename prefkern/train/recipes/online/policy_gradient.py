"""Rows of single answers for policy gradients: a target to move to, or advantages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .... import losses
from ....losses import advantages
from ....losses.pointwise import fdpg
from ....losses.record import Loss
from .rows import Lists, RoundModels, RowMaker, single_rows


class TargetRows(RowMaker):
    """f-DPG's target, the reference tilted by the scores, and the policy that drew the answers."""

    name = "fdpg"
    makes = ("log_target_prob", "proposal_logp")
    columns = ("proposal_logp",)
    least, distinct = 1, False
    reads = ("reference",)

    @classmethod
    def serves(cls, record: Loss) -> bool:
        return "log_target_prob" in losses.required(record)

    def rows(self, lists: Lists, models: RoundModels) -> list[dict[str, Any]]:
        lists, both = models.logps(lists, "reference", "policy")
        ref, own = ([float(x.double().sum()) for x in side] for side in both)
        return target_rows(lists, ref, own, beta=self.config.target_beta)

    def facts(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        given = {k: v for k, v in self.config.loss_args.items() if k == "divergence"}
        return {"baseline": fdpg_baseline(rows, **given)}

    def loss_args(self, facts: Mapping[str, float]) -> dict[str, Any]:
        return {"baseline": facts["baseline"]}


class AdvantageRows(RowMaker):
    """Advantages of an answer within its list."""

    name = "advantages"
    makes: ClassVar[tuple[str, ...]] = ("advantages", "old_logp")
    columns: ClassVar[tuple[str, ...]] = ("old_logp",)
    distinct = False

    @classmethod
    def serves(cls, record: Loss) -> bool:
        return "advantages" in losses.required(record) and not TokenRewardRows.serves(record)

    def rows(self, lists: Lists, models: RoundModels) -> list[dict[str, Any]]:
        lists, (own,) = models.logps(lists, "policy")
        each = self.config.judge_normalize == "each"
        mode = "normalize_then_sum" if each else "sum_then_normalize"
        return rows_with_advantages(lists, own, weights=self.config.judge_weights, mode=mode)


class TokenRewardRows(AdvantageRows):
    """Advantages of every token, from the token rewards of a DPO-trained model (RTO), and what its
    critic is trained on."""

    name = "rto"
    makes: ClassVar[tuple[str, ...]] = (*AdvantageRows.makes, "old_values", "returns")
    columns: ClassVar[tuple[str, ...]] = ("old_logp", "old_values", "returns")
    least = 1
    reads = ("reference", "aux", "values")
    REWARDS: ClassVar[tuple[str, ...]] = ("beta1", "beta2", "beta3", "dpo_reward_clip")
    TRACE: ClassVar[tuple[str, ...]] = ("gamma", "lam")
    takes = (*REWARDS, *TRACE)

    @classmethod
    def serves(cls, record: Loss) -> bool:
        return record.name == "rto"

    def check(self) -> None:
        super().check()
        for name in self.TRACE:
            if self.config.loss_args.get(name, 0.0) > 1.0:
                raise ValueError(
                    f"loss_args: {name} must be in [0, 1], got {self.config.loss_args[name]}."
                )

    def rows(self, lists: Lists, models: RoundModels) -> list[dict[str, Any]]:
        if models.aux is None:
            raise ValueError(
                f"loss {self.records[0].name!r} reads token rewards off a DPO-trained model: set "
                "aux_model."
            )
        lists, (aux, ref, own) = models.logps(lists, "aux", "reference", "policy")
        return token_reward_rows(
            lists, aux, ref, own, models.values(lists),
            rewards=self.given(*self.REWARDS), trace=self.given(*self.TRACE),
        )  # fmt: skip


def target_rows(
    lists: Lists,
    ref_logps: Sequence[float],  # one per answer, in order
    own_logps: Sequence[float],
    *,
    beta: float,
) -> list[dict[str, Any]]:
    """Single answers with f-DPG's columns: `log_target_prob` and `proposal_logp`.

    The target is p(y|x) = r(y|x) exp(score / beta) / Z(x), r the reference; Z(x) is estimated from
    the answers to x, which were drawn from q: Z = mean of r exp(score / beta) / q.
    """
    targets, at = list[float](), 0
    for row in lists:
        k = len(row["completions"])
        score = torch.tensor(row["scores"], dtype=torch.float64)
        ref = torch.tensor(ref_logps[at : at + k], dtype=torch.float64)
        own = torch.tensor(own_logps[at : at + k], dtype=torch.float64)
        at += k
        log_p = ref + score / beta
        log_z = torch.logsumexp(log_p - own, 0) - math.log(k)
        targets += (log_p - log_z).tolist()
    columns = {"log_target_prob": targets, "proposal_logp": [float(x) for x in own_logps]}
    return single_rows(lists, columns)


def fdpg_baseline(rows: Sequence[Mapping[str, Any]], divergence: str = "js") -> float:
    """Mean of -f' over a round's answers under the policy that drew them: the round's baseline."""
    own, target = (
        torch.tensor([row[name] for row in rows], dtype=torch.float64)
        for name in ("proposal_logp", "log_target_prob")
    )
    return float(fdpg.advantages(own, target, divergence).mean())


def rows_with_advantages(
    lists: Lists,
    own_logps: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    mode: str = "sum_then_normalize",
) -> list[dict[str, Any]]:
    """Single answers with `advantages` (group-relative) and `old_logp` per token.

    `weights` and `mode` are those of prefkern.losses.advantages.group_advantages, for lists with
    several `objectives`.
    """
    name = "scores" if weights is None else "objectives"
    rewards = torch.tensor([s for row in lists for s in row[name]], dtype=torch.float64)
    sizes = torch.tensor([0, *(len(row["scores"]) for row in lists)])
    values = advantages.group_advantages(rewards, sizes.cumsum(0).int(), weights=weights, mode=mode)
    return single_rows(
        lists, {"advantages": values.tolist(), "old_logp": [x.tolist() for x in own_logps]}
    )


def token_reward_rows(
    lists: Lists,
    aux_logps: Sequence[Tensor],  # each [t]
    ref_logps: Sequence[Tensor],
    own_logps: Sequence[Tensor],
    own_values: Sequence[Tensor],
    *,
    rewards: Mapping[str, float] | None = None,
    trace: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Single answers with RTO's columns, per token: `advantages`, `old_logp`, `old_values` and
    `returns`.

    Token rewards are a DPO-trained model's log-ratios, a KL penalty and the score at the end,
    which is normalised over all answers here. Advantages are whitened over all tokens here, the
    critic's returns are not.

    Args:
        aux_logps, ref_logps, own_logps: Of the DPO-trained model, the reference and the policy.
        own_values: V of the policy at the state before each token; 0 without a value head.
        rewards: Of prefkern.losses.advantages.rto_rewards: beta1, beta2, beta3, dpo_reward_clip.
        trace: Of prefkern.losses.advantages.gae: gamma, lam.
    """
    scores = torch.tensor([s for row in lists for s in row["scores"]], dtype=torch.float64)
    scores = (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-8)
    sizes = [len(x) for x in own_logps]
    cu = torch.tensor([0, *sizes]).cumsum(0).int()
    aux, ref, own, value = (
        torch.cat(list(x)).double() for x in (aux_logps, ref_logps, own_logps, own_values)
    )
    every = torch.ones(len(own), dtype=torch.bool)
    dense = advantages.rto_rewards(aux, ref, own, scores, cu, every, **(rewards or {}))
    values, returns = advantages.gae(dense, value, cu, every, **(trace or {}))
    whitened = advantages.whiten(values, every)
    columns = {
        "advantages": whitened, "old_logp": own, "old_values": value, "returns": returns,
    }  # fmt: skip
    return single_rows(
        lists, {name: [x.tolist() for x in all_.split(sizes)] for name, all_ in columns.items()}
    )
