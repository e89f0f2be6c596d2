"""Options of the catalogue that no vector covers: steps, moving averages, exponents, prompts."""

from __future__ import annotations

import pytest
import torch
from loss_batch import cu
from torch.nn.functional import softplus

from prefkern import losses, preference_loss
from prefkern.losses import weights
from prefkern.losses.pointwise import fdpg
from prefkern.stats import SeqStats, TokenStats


def trajectories():
    """Two responses of 4 and 3 scored tokens, a prompt token before the second, one left out."""
    g = torch.Generator().manual_seed(1)
    logp, ref, rkl, value = (torch.randn(9, generator=g, dtype=torch.float64) for _ in range(4))
    tokens = TokenStats(logp=logp.requires_grad_(), ref_logp=ref, rkl=rkl.requires_grad_())
    scored = torch.tensor([True, True, True, True, False, True, False, True, True])
    steps = torch.tensor([1, 1, 2, 3, 0, 1, 0, 1, 2])
    reward = torch.tensor([1.0, -0.5], dtype=torch.float64)
    return tokens, scored, steps, value.requires_grad_(), reward


def test_steps_of_oreo_against_a_loop():
    tokens, scored, steps, value, reward = trajectories()
    beta, alpha = 0.3, 0.1
    loss = losses.oreo(
        tokens,
        cu(0, 4, 9),
        scored=scored,
        value=value,
        reward=reward,
        beta=beta,
        alpha=alpha,
        level="step",
        step_index=steps,
    )
    rho, want = tokens.logp - tokens.ref_logp, []
    for start, end, r in ((0, 4, reward[0]), (4, 9, reward[1])):
        rows = [t for t in range(start, end) if scored[t]]
        numbers = sorted({int(steps[t]) for t in rows})
        total = torch.zeros((), dtype=torch.float64)
        for k in numbers:
            own = [t for t in rows if steps[t] == k]
            here = sum(rho[t] for t in own)
            later = sum((rho[t] for t in rows if steps[t] > k), torch.zeros(()).double())
            v = value[own[0]]
            total = total + (v - r + beta * (here + later).detach()) ** 2
            total = total + (v.detach() - r + beta * here + beta * later.detach()) ** 2
        kl = sum(tokens.rkl[t] for t in rows) / len(rows)
        want.append(total / len(numbers) + alpha * kl)
    torch.testing.assert_close(loss, torch.stack(want))
    leaves = (tokens.logp, value, tokens.rkl)
    got, right = (torch.autograd.grad(x.sum(), leaves) for x in (loss, torch.stack(want)))
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b)


def test_one_token_per_step_is_the_token_level():
    tokens, scored, _, value, reward = trajectories()
    call = dict(scored=scored, value=value, reward=reward)
    steps = torch.arange(9)
    torch.testing.assert_close(
        losses.oreo(tokens, cu(0, 4, 9), level="step", step_index=steps, **call),
        losses.oreo(tokens, cu(0, 4, 9), **call),
    )
    # numbers that repeat from one response to the next are still different steps
    again = torch.tensor([0, 1, 2, 3, 3, 3, 3, 4, 5])
    torch.testing.assert_close(
        losses.oreo(tokens, cu(0, 4, 9), level="step", step_index=again, **call),
        losses.oreo(tokens, cu(0, 4, 9), **call),
    )
    with pytest.raises(ValueError, match="'oreo': level 'step' needs step_index"):
        losses.oreo(tokens, cu(0, 4, 9), level="step", **call)


def test_baseline_of_fdpg_is_the_mean_of_the_last_samples():
    logp = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([-2.0, -2.0, -2.5], dtype=torch.float64)
    seq, state = SeqStats(logp=logp), fdpg.FdpgState()
    assert state.mean == 0.0
    state = fdpg.update(state, seq, log_target_prob=target)
    gain = fdpg.advantages(logp, target, "js")
    assert state.mean.item() == pytest.approx(gain.mean().item())
    loss = losses.fdpg(seq, log_target_prob=target, baseline=state.mean)
    (grad,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(-grad, gain - gain.mean())  # w = 1: the policy drew them
    for _ in range(fdpg.WINDOW):
        state = fdpg.update(state, seq.index(slice(1, 2)), log_target_prob=target[1:2])
    assert len(state.recent) == fdpg.WINDOW and state.mean.item() == pytest.approx(gain[1].item())


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_length_exponent_of_rrhf(power):
    logp = torch.tensor([-6.0, -8.0, -3.0, 0.0], dtype=torch.float64, requires_grad=True)
    length = torch.tensor([3.0, 2.0, 4.0, 0.0], dtype=torch.float64)
    relevance = torch.tensor([2.0, 1.0, 0.0, 5.0], dtype=torch.float64)  # the empty one is left out
    loss = losses.rrhf(
        logp / length.clamp(min=1),
        relevance,
        cu(0, 4),
        logp=logp,
        length=length,
        length_penalty=power,
    )
    a = [x / n**power for x, n in zip(logp.tolist(), (3, 2, 4), strict=False)]
    hinge = sum(max(0.0, a[j] - a[i]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert loss.item() == pytest.approx(hinge + 6.0)
    with pytest.raises(ValueError, match="'rrhf': length_penalty other than 1 needs length"):
        losses.rrhf(logp, relevance, cu(0, 4), logp=logp, length_penalty=0.5)


def test_step_cosines_against_a_loop():
    g = torch.Generator().manual_seed(3)
    states = torch.randn(14, 4, generator=g, dtype=torch.float64)
    bounds, groups = cu(0, 4, 9, 12, 14), cu(0, 3, 4)
    relevance = torch.tensor([0.0, 2.0, 2.0, 1.0])  # the second answer is the first list's best
    steps = torch.tensor([1, 1, 2, 4, 0, 1, 2, 2, 3, 1, 2, 2, 0, 1])
    scored = torch.ones(14, dtype=torch.bool)
    scored[7] = False
    got = weights.step_cosine(states, bounds, groups, relevance, scored, steps)
    best = {0: 1, 1: 1, 2: 1, 3: 3}

    def mean(answer, k):
        span = range(int(bounds[answer]), int(bounds[answer + 1]))
        rows = [t for t in span if steps[t] == k and scored[t]]
        return states[rows].mean(0) if rows else None

    for answer in range(4):
        for t in range(int(bounds[answer]), int(bounds[answer + 1])):
            k = int(steps[t])
            own, other = mean(answer, k), mean(best[answer], k)
            want = -1.0
            if k and scored[t] and other is not None:
                want = torch.nn.functional.cosine_similarity(own, other, dim=0).item()
            assert got[t].item() == pytest.approx(want, abs=1e-12), t
    found = weights.tree_tpo(bounds, scored, steps, got).weights
    # a step the best answer lacks (4) weighs nothing, the best answer's own steps weigh alike
    assert found[3] == 0 and torch.isfinite(found).all()
    assert found[5].item() == pytest.approx(1 / 3) and found[13].item() == 1.0


def test_orpo_likelihood_may_score_the_prompt():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 5, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(9, 5, generator=g, dtype=torch.float64).requires_grad_()
    whole = torch.randint(0, 9, (4, 6), generator=g)
    whole[0, 5] = -100
    answer = whole.clone()
    answer[:, :2] = -100
    for name, args in (("orpo", {}), ("simpo", {"sft_weight": 0.5}), ("asft", {})):
        own = {"orpo": "nll_weight", "simpo": "sft_weight", "asft": "nll_weight"}[name]
        loss, found = preference_loss(
            hidden, weight, answer, loss=name, likelihood_targets=whole, **args
        )
        bare, _ = preference_loss(hidden, weight, answer, loss=name, **{own: 0.0})
        logp = torch.log_softmax(hidden @ weight.T, -1)
        logp = logp.gather(-1, whole.clamp(min=0)[..., None])[..., 0] * (whole != -100)
        size = (whole != -100).sum(1)
        nll = -logp[::2].sum() / size[::2].sum()
        if name == "asft":  # the mean of each sequence
            nll = -(logp[::2].sum(1) / size[::2]).mean()
        want = bare + args.get("sft_weight", 1.0) * nll
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(found["nll_loss"], nll.detach())
        got, right = (torch.autograd.grad(x, (hidden, weight)) for x in (loss, want))
        for a, b in zip(got, right, strict=True):
            torch.testing.assert_close(a, b)
    for bad, message in (
        (whole[:, :5], "shape of targets"),
        (whole.roll(1, 1), "equal targets where"),
        (whole.double(), "likelihood_targets"),
    ):
        with pytest.raises(ValueError, match=message):
            preference_loss(hidden, weight, answer, loss="orpo", likelihood_targets=bad)
    with pytest.raises(ValueError, match="loss ln_dpo has none"):
        preference_loss(
            hidden,
            weight,
            answer,
            loss="ln_dpo",
            likelihood_targets=whole,
            ref_logp=torch.zeros(4, 6).double(),
        )


def test_selfie_doubts_by_logits_away_from_the_reference():
    """The margin under 1.5 z - 0.5 z_ref flags one of two pairs, the policy's own none."""
    g = torch.Generator().manual_seed(0)
    hidden, ref = (torch.randn(4, 3, 6, generator=g, dtype=torch.float64) for _ in range(2))
    head = torch.randn(20, 6, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 20, (4, 3), generator=g)

    def summed(states):
        z = states @ head.T
        return z.log_softmax(-1).gather(-1, targets[..., None]).sum((1, 2))

    def margin(h):
        gap = h - summed(ref)
        return 0.1 * (gap[0::2] - gap[1::2])

    away = margin(summed(1.5 * hidden - 0.5 * ref))
    own = margin(summed(hidden))
    cut = away.mean().item()
    for mixture, c in ((1.5, away), (1.0, own)):
        flagged = torch.where(c <= cut, 0.9, 1.0)
        want = (flagged * softplus(-own) + (1 - flagged) * softplus(own)).mean()
        found, _ = preference_loss(
            hidden, head, targets, loss="selfie", ref_hidden=ref, mixture=mixture, threshold=cut
        )
        torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=0)
    assert (away <= cut).tolist() != (own <= cut).tolist()  # else the mixture would not show
