"""Rows of single answers by hand: a target, advantages within a list, advantages of tokens."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from online_model import JUDGE, letters_model, write_rows
from tiny_models import config

from prefkern.losses.pointwise import fdpg
from prefkern.train import train
from prefkern.train.recipes.online import policy_gradient

LISTS = [
    {"prompt": "x", "completions": ["a", "bb", "ccc"], "scores": [1.0, 4.0, 1.0]},
    {"prompt": "y", "completions": ["d", "ee"], "scores": [-2.0, 2.0]},
]
LOGPS = [torch.tensor([-0.5] * n) for n in (2, 3, 4, 2, 3)]
NO_VALUES = [torch.zeros_like(x) for x in LOGPS]


def relative(scores: list[float]) -> list[float]:
    """GRPO's: centred within the list, over its standard deviation."""
    mean, deviation = statistics.mean(scores), statistics.stdev(scores)
    return [(score - mean) / (deviation + 1e-4) for score in scores]


def test_advantages_are_centred_and_scaled_within_a_list():
    rows = policy_gradient.rows_with_advantages(LISTS, LOGPS)
    want = relative([1.0, 4.0, 1.0]) + relative([-2.0, 2.0])
    assert [row["advantages"] for row in rows] == pytest.approx(want)
    assert [row["completion"] for row in rows] == ["a", "bb", "ccc", "d", "ee"]
    assert [row["prompt"] for row in rows] == ["x"] * 3 + ["y"] * 2
    assert [len(row["old_logp"]) for row in rows] == [2, 3, 4, 2, 3]
    assert all(row.keys() == {"prompt", "completion", "advantages", "old_logp"} for row in rows)


def test_advantages_of_a_round_are_those_of_its_scores(tmp_path):
    """The same through a whole round: what the judge gave, group by group."""
    (tmp_path / "judge.py").write_text(JUDGE)
    model = letters_model(tmp_path)
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": f"{x}:"} for x in "pqrs"])
    train(
        config(
            tmp_path / "run", model, prompts, loss=("grpo",), round_data="online", num_rounds=1,
            judge=f"{tmp_path}/judge.py:share_of_a", num_generations=4, max_new_tokens=8,
            keep_unfinished=True, max_steps=1,
        )
    )  # fmt: skip
    lines = (tmp_path / "run" / "round-0" / "data.jsonl").read_text().splitlines()
    groups: dict[str, list[dict]] = {}
    for line in lines:
        row = json.loads(line)
        groups.setdefault(row["prompt"], []).append(row)
    moved = 0
    for rows in groups.values():
        scores = [row["completion"].count("a") / len(row["completion"]) for row in rows]
        assert [r["advantages"] for r in rows] == pytest.approx(relative(scores), abs=1e-9)
        moved += len(set(scores)) > 1
    assert moved


def test_token_rewards_end_with_the_normalised_score():
    """With all models alike a token's reward is 0 but at the end of its answer."""
    rows = policy_gradient.token_reward_rows(LISTS, LOGPS, LOGPS, LOGPS, NO_VALUES)
    scores = [1.0, 4.0, 1.0, -2.0, 2.0]
    mean, deviation = statistics.mean(scores), statistics.pstdev(scores)
    plain = [
        [0.95 ** (len(logp) - 1 - t) * (score - mean) / deviation for t in range(len(logp))]
        for score, logp in zip(scores, LOGPS, strict=True)
    ]
    flat = [x for one in plain for x in one]
    centre, width = statistics.mean(flat), statistics.stdev(flat)
    for row, want in zip(rows, plain, strict=True):
        assert row["advantages"] == pytest.approx([(x - centre) / width for x in want], rel=1e-6)


def test_token_rewards_read_each_model_in_its_place():
    """One answer, one score: the rewards are 0.05 (aux - ref) - 0.01 (own - ref), whitened."""
    lists = [{"prompt": "x", "completions": ["ab"], "scores": [3.0]}]
    aux, ref, own = (torch.tensor(x) for x in ([-1.0, -4.0], [-2.0, -1.0], [-3.0, -1.5]))
    (row,) = policy_gradient.token_reward_rows(lists, [aux], [ref], [own], [0.0 * own])
    reward = (0.05 * (aux - ref) - 0.01 * (own - ref)).tolist()
    total = [reward[0] + 0.95 * reward[1], reward[1]]
    centre, width = statistics.mean(total), statistics.stdev(total)
    assert row["advantages"] == pytest.approx([(x - centre) / width for x in total], rel=1e-5)
    assert row["old_logp"] == own.tolist()


def test_a_critic_and_its_arguments_by_a_loop():
    """Advantages and returns with values, every weight another, from the recursion itself."""
    given = {"beta1": 0.3, "beta2": 0.2, "beta3": 2.0, "dpo_reward_clip": 0.4}
    generator = torch.Generator().manual_seed(0)
    aux, ref, own, value = (
        [-3 * torch.rand(len(x), generator=generator).double() for x in LOGPS] for _ in range(4)
    )
    rows = policy_gradient.token_reward_rows(
        LISTS, aux, ref, own, value, rewards=given, trace={"gamma": 0.9, "lam": 0.7}
    )
    scores = [1.0, 4.0, 1.0, -2.0, 2.0]
    mean, deviation = statistics.mean(scores), statistics.pstdev(scores)
    plain = []
    for a, r, o, v, score in zip(aux, ref, own, value, scores, strict=True):
        reward = [
            max(-0.4, min(0.4, 0.3 * float(a[t] - r[t]))) - 0.2 * float(o[t] - r[t])
            for t in range(len(o))
        ]
        reward[-1] += 2.0 * (score - mean) / deviation
        ahead, found = 0.0, []
        for t in reversed(range(len(o))):
            later = float(v[t + 1]) if t + 1 < len(o) else 0.0
            ahead = reward[t] + 0.9 * later - float(v[t]) + 0.9 * 0.7 * ahead
            found.append(ahead)
        plain.append(found[::-1])
    flat = [x for one in plain for x in one]
    centre, width = statistics.mean(flat), statistics.stdev(flat)
    for row, want, v in zip(rows, plain, value, strict=True):
        assert row["advantages"] == pytest.approx([(x - centre) / width for x in want], rel=1e-6)
        assert row["returns"] == pytest.approx([x + float(y) for x, y in zip(want, v, strict=True)])
        assert row["old_values"] == v.tolist()


def test_target_columns_by_hand():
    lists = [{"prompt": "x", "completions": ["a", "b"], "scores": [0.0, 1.0]}]
    rows = policy_gradient.target_rows(lists, [-1.0, -2.0], [-1.5, -0.5], beta=0.5)
    p = torch.tensor([-1.0, 0.0], dtype=torch.float64)  # log r + score / 0.5
    z = (torch.exp(p[0] + 1.5) + torch.exp(p[1] + 0.5)) / 2
    assert [row["log_target_prob"] for row in rows] == pytest.approx((p - z.log()).tolist())
    assert [row["proposal_logp"] for row in rows] == [-1.5, -0.5]


@pytest.mark.parametrize("divergence", ["js", "reverse_kl"])
def test_the_baseline_of_a_round_is_the_mean_of_its_advantages(divergence):
    rows = [{"proposal_logp": -1.0, "log_target_prob": -2.0},
            {"proposal_logp": -3.0, "log_target_prob": -2.5}]  # fmt: skip
    own, target = torch.tensor([-1.0, -3.0]).double(), torch.tensor([-2.0, -2.5]).double()
    want = fdpg.advantages(own, target, divergence).mean().item()
    assert policy_gradient.fdpg_baseline(rows, divergence) == pytest.approx(want)
    js = [math.log1p(math.exp(-x)) - math.log(2) for x in (1.0, -0.5)]
    if divergence == "js":
        assert want == pytest.approx(sum(js) / 2)
