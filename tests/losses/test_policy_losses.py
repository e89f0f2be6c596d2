"""Policy-gradient losses, their advantages, and divergences: conventions and refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import vectors
from loss_batch import answers, cu

from prefkern import losses
from prefkern.losses import advantages, weights
from prefkern.losses.pointwise import fdpg
from prefkern.stats import TokenStats


def policy(*logp, ref=0.0):
    x = torch.tensor(logp, dtype=torch.float64)
    return TokenStats(logp=x.requires_grad_(), ref_logp=torch.full_like(x, ref))


def test_clip_stops_the_gradient_on_the_far_side_only():
    for advantage, ratio, slope in ((1, 1.3, 0), (1, 0.5, -0.5), (-1, 0.5, 0), (-1, 1.3, 1.3)):
        tokens = policy(math.log(ratio))
        loss = losses.grpo(
            tokens, cu(0, 1), scored=torch.tensor([True]), advantages=torch.tensor([advantage]),
            old_logp=torch.zeros(1), beta=0.0,
        )  # fmt: skip
        loss.sum().backward()
        assert tokens.logp.grad.item() == pytest.approx(slope), (advantage, ratio)


def test_first_step_of_grpo_is_reinforce():
    tokens = policy(-1.0, -2.0, -3.0)
    scored = torch.tensor([True, True, True])
    loss = losses.grpo(
        tokens, cu(0, 1, 3), scored=scored, advantages=torch.tensor([2.0, -1.0]), beta=0.0
    )
    assert loss.tolist() == [-2.0, 1.0]
    loss.sum().backward()
    assert tokens.logp.grad.tolist() == [-2.0, 0.5, 0.5]


def test_gae_against_a_loop():
    g = torch.Generator().manual_seed(0)
    bounds = cu(0, 6, 6, 7, 20)
    reward, value = (torch.randn(20, generator=g, dtype=torch.float64) for _ in range(2))
    scored = torch.rand(20, generator=g) > 0.3
    got, returns = advantages.gae(reward, value, bounds, scored, gamma=0.9, lam=0.8)
    want = torch.zeros(20, dtype=torch.float64)
    for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        later = v = 0.0
        for t in reversed([t for t in range(a, b) if scored[t]]):
            later = reward[t] + 0.9 * v - value[t] + 0.9 * 0.8 * later
            want[t], v = later, value[t]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(returns, torch.where(scored, want + value, 0.0))
    white = advantages.whiten(got, scored)
    assert white[scored].mean().abs() < 1e-12 and white[scored].var().item() == pytest.approx(1)
    assert (white[~scored] == 0).all()
    nothing = advantages.gae(reward, value, bounds, torch.zeros(20, dtype=torch.bool))
    assert all((x == 0).all() for x in nothing)


def test_group_advantages_degenerate():
    nan = float("nan")
    rewards = torch.tensor([1.0, 1.0, 5.0, nan, 2.0, 4.0])
    got = advantages.group_advantages(rewards, cu(0, 2, 3, 6))
    assert got[:4].tolist() == [0.0, 0.0, 0.0, 0.0]  # no variance, one alone, no reward
    root = 2**-0.5
    assert got[4:].tolist() == pytest.approx([-root, root], rel=1e-3)
    batch = advantages.group_advantages(rewards, cu(0, 2, 3, 6), scale="batch")
    std = rewards[~rewards.isnan()].std()
    assert batch[5].item() == pytest.approx((1.0 / (std + 1e-4)).item(), rel=1e-6)
    with pytest.raises(ValueError, match="weights must have one number"):
        advantages.group_advantages(rewards, cu(0, 6), weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="mode must be one of"):
        advantages.group_advantages(rewards, cu(0, 6), mode="sum")


def test_trpa_without_pairs():
    tokens = policy(0.5, -0.5)
    given = {"scored": torch.ones(2, dtype=torch.bool), "cu_groups": cu(0, 2)}
    for level, sign in ((1, 1.0), (2, -1.0)):
        levels = torch.full((2,), level)
        got = losses.trpa(tokens, cu(0, 1, 2), preference_levels=levels, **given)
        want = -F.logsigmoid(sign * tokens.logp.detach())
        torch.testing.assert_close(got.detach(), want)
        none = losses.trpa(tokens, cu(0, 1, 2), preference_levels=levels, fallback=False, **given)
        assert none.tolist() == [0.0, 0.0]
    root = losses.trpa(
        tokens, cu(0, 1, 2), preference_levels=torch.ones(2), fallback=False, sqrt_kl=True,
        tr_kl_loss_coef=1.0, **given,
    )  # fmt: skip
    assert root.tolist() == [0.5, 0.5]


def test_oreo_of_one_token_has_no_future():
    tokens = policy(-1.0)._replace(rkl=torch.tensor([0.2], dtype=torch.float64))
    value = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    given = {"scored": torch.tensor([True]), "value": value, "reward": torch.tensor([1.0])}
    loss = losses.oreo(tokens, cu(0, 1), beta=0.5, alpha=0.1, **given)
    delta = 0.3 - 1.0 - 0.5
    assert loss.item() == pytest.approx(2 * delta**2 + 0.02)
    policy_slope, value_slope = torch.autograd.grad(loss.sum(), [tokens.logp, value])
    assert policy_slope.item() == pytest.approx(2 * 0.5 * delta)
    assert value_slope.item() == pytest.approx(2 * delta)
    for options, message in (({"kl": "jsd"}, "kl must be"), ({"level": "steps"}, "level must be")):
        with pytest.raises(ValueError, match=message):
            losses.oreo(tokens, cu(0, 1), **options, **given)


def test_refusals_of_policy_losses():
    tokens, one = policy(-1.0, -2.0), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match="max_length"):
        losses.grpo(tokens, cu(0, 2), scored=one, advantages=torch.ones(1), aggregation="dr_grpo")
    with pytest.raises(ValueError, match="aggregation must be one of"):
        losses.grpo(tokens, cu(0, 2), scored=one, advantages=torch.ones(1), aggregation="mean")
    with pytest.raises(ValueError, match=r"advantages must be \[S\]"):
        losses.grpo(tokens, cu(0, 2), scored=one, advantages=torch.ones(3))
    with pytest.raises(ValueError, match="old_values"):
        losses.rto(tokens, cu(0, 2), scored=one, advantages=torch.ones(1), value_pred=torch.ones(2))
    with pytest.raises(ValueError, match="estimator must be"):
        losses.kl_penalty(tokens, cu(0, 2), scored=one, estimator="k4")
    with pytest.raises(ValueError, match="ref_logp"):
        losses.kl_penalty(tokens._replace(ref_logp=None), cu(0, 2), scored=one)


def test_kl_estimates_stay_finite():
    for far in (-1e4, 1e4):
        tokens = policy(far)
        loss = losses.kl_penalty(tokens, cu(0, 1), scored=torch.tensor([True]))
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(tokens.logp.grad).all()


@pytest.mark.parametrize("divergence", fdpg.DIVERGENCES)
def test_fdpg_slopes(divergence):
    """A = -f'(t), against a derivative of the generator f by finite differences."""
    generators = {
        "forward_kl": lambda t: -math.log(t), "reverse_kl": lambda t: t * math.log(t),
        "js": lambda t: t * math.log(t) - (t + 1) * math.log((t + 1) / 2),
        "tv": lambda t: 0.5 * abs(t - 1), "chi2": lambda t: t + 1 / t,
        "reverse_chi2": lambda t: (t - 1) ** 2,
    }  # fmt: skip
    for logt in (-1.3, 0.7):
        t, h = math.exp(logt), 1e-6
        f = generators[divergence]
        slope = (f(t + h) - f(t - h)) / (2 * h)
        got = fdpg.advantages(torch.tensor([logt]).double(), torch.zeros(1), divergence)
        assert got.item() == pytest.approx(-slope, rel=1e-6)
    far = fdpg.advantages(torch.tensor([1e4, -1e4]), torch.zeros(2), divergence)
    assert torch.isfinite(far).all()


def test_refusals_of_divergences():
    seq = answers(0.0)
    for name, options, message in (
        ("gkd", {"beta": 1.5}, "beta must be in"),
        ("distill", {"divergence": "kl"}, "divergence must be one of"),
        ("distill", {"divergence": "renyi", "order": 0.0}, "order must be in"),
        ("fdpg", {"log_target_prob": torch.zeros(1), "divergence": "kl"}, "divergence must be"),
    ):
        with pytest.raises(ValueError, match=message):
            losses.LOSSES[name](seq, **options)
    with pytest.raises(ValueError, match="jsd"):
        losses.gkd(seq)
    assert losses.bind(losses.gkd, {"beta": 0.1}).stats == ("jsd:0.1",)
    assert losses.bind(losses.dckd, {"top_k": 50}).stats == ("logp", "bkl:50")
    assert losses.bind(losses.tisdpo, {"alpha": 1.0}, supplied=losses.required("tisdpo")).stats


def test_rank_transform_example():
    example = vectors.load("token")["aux"]["tisdpo_rank_based_example"]
    x = vectors.tensor(example["input"])
    got = weights.tisdpo(
        x, torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64),
        torch.ones(4, dtype=torch.bool), torch.tensor([0, 4], dtype=torch.int32),
        transform="rank_based",
    )  # fmt: skip
    vectors.assert_close("rank", got.weights, example["output"], relative=1e-12)


def test_group_advantages():
    data = vectors.load("list")["group_advantages"]
    rewards = torch.stack([vectors.tensor(data["reward_1"]), vectors.tensor(data["reward_2"])], 1)
    cu = torch.tensor(data["offsets"], dtype=torch.int32)
    missing = rewards.clone()
    missing[data["missing_index"]] = float("nan")
    calls = {
        "sum_then_normalize": {}, "population_std": {"unbiased": False},
        "no_scaling": {"scale": "none"}, "normalize_then_sum": {"mode": "normalize_then_sum"},
    }  # fmt: skip
    shared = {"weights": data["weights"], "std_eps": data["eps"]}
    for name, want in data["advantages"].items():
        given = missing if name == "one_missing_reward" else rewards
        got = advantages.group_advantages(given, cu, **shared, **calls.get(name, {}))
        vectors.assert_close(name, got, want, relative=1e-11)
