"""Conventions, options the vectors do not cover, and bad arguments of single losses."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from prefkern import losses
from prefkern.losses import links
from prefkern.losses.pairwise import beta_dpo
from prefkern.losses.pointwise.bco import density_weight
from prefkern.losses.pointwise.kto import kl_baseline
from prefkern.stats import SeqStats


def answers(*logratios, ref=-20.0, length=8.0):
    logratio = torch.tensor(logratios, dtype=torch.float64)
    reference = torch.full_like(logratio, ref)
    return SeqStats(
        logp=(reference + logratio).requires_grad_(),
        ref_logp=reference,
        length=torch.full_like(logratio, length),
    )


def gradients(loss, *sides):
    return torch.autograd.grad(loss.sum(), [s.logp for s in sides])


def test_first_step_of_dpo():
    chosen, rejected = answers(0.0), answers(0.0)
    loss = losses.dpo(chosen, rejected, beta=0.1)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)
    good, bad = gradients(loss, chosen, rejected)
    assert good.item() == pytest.approx(-0.05) and bad.item() == pytest.approx(0.05)


def test_kinks_have_derivative_zero():
    chosen, rejected = answers(0.0), answers(0.0)
    good, bad = gradients(losses.dpop(chosen, rejected, beta=0.3), chosen, rejected)
    assert good.item() == pytest.approx(-0.15) and bad.item() == pytest.approx(0.15)
    chosen, rejected = answers(20.0), answers(0.0)  # beta 0.05: the margin is exactly 1
    assert all(g.item() == 0 for g in gradients(losses.hinge(chosen, rejected), chosen, rejected))
    chosen, rejected = answers(1.0), answers(0.0)
    assert all(g.item() == 0 for g in gradients(losses.slic_hf(chosen, rejected), chosen, rejected))


def test_apo_down_leaves_the_chosen_answer_alone_at_first():
    chosen, rejected = answers(0.0), answers(0.0)
    good, bad = gradients(losses.apo_down(chosen, rejected), chosen, rejected)
    assert good.item() == 0 and bad.item() == pytest.approx(0.1 * 0.25)


def test_dpo_options():
    chosen, rejected = answers(1.0, -2.0, 0.5), answers(0.0, 1.0, -1.0)
    plain = losses.dpo(chosen, rejected)
    weighted = losses.dpo(chosen, rejected, pair_weight=torch.tensor([1.0, 0.0, 2.0]))
    assert torch.equal(weighted, plain * torch.tensor([1.0, 0.0, 2.0]))
    offset = torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64)
    margin = 0.1 * (chosen.logratio - rejected.logratio) - offset
    assert torch.allclose(losses.dpo(chosen, rejected, offset=offset), links.logistic(margin))
    per_pair = losses.dpo(chosen, rejected, beta=torch.tensor([0.1, 0.2, 0.3]))
    assert per_pair[0].item() == pytest.approx(plain[0].item(), rel=1e-7)
    free = losses.dpo(
        chosen._replace(ref_logp=None), rejected._replace(ref_logp=None), reference_free=True
    )
    assert torch.allclose(free, links.logistic(0.1 * (chosen.logp - rejected.logp)))
    smoothed = losses.dpo(chosen, rejected, label_smoothing=0.2)
    m = 0.1 * (chosen.logratio - rejected.logratio)
    want = [0.8 * math.log1p(math.exp(-v)) + 0.2 * math.log1p(math.exp(v)) for v in m.tolist()]
    assert smoothed.tolist() == pytest.approx(want, rel=1e-12)
    for name, value in (("pair_weight", torch.ones(2)), ("offset", torch.ones(3, 1))):
        with pytest.raises(ValueError, match=f"{name} must be a number or a tensor"):
            losses.dpo(chosen, rejected, **{name: value})


def test_ipo_sums_and_identical_answers():
    chosen, rejected = answers(3.0), answers(-1.0)
    assert losses.ipo(chosen, rejected, beta=0.01, norm="sum").item() == pytest.approx(
        (4.0 - 50.0) ** 2
    )
    assert losses.ipo(chosen, rejected, beta=0.1).item() == pytest.approx((4.0 / 8.0 - 5.0) ** 2)
    same = answers(1.0)
    assert losses.ipo(same, same, beta=0.1).item() == pytest.approx(25.0)


def test_simpo_hinge_and_empty_answer():
    chosen, rejected = answers(0.0, length=0.0), answers(0.0)
    chosen = chosen._replace(logp=torch.zeros(1, dtype=torch.float64, requires_grad=True))
    loss = losses.simpo(chosen, rejected, link="hinge")
    assert loss.item() == pytest.approx(max(0.0, 1.0 - 2.0 * (2.5 - 0.25)))
    assert torch.isfinite(losses.simpo(chosen, rejected)).all()
    with pytest.raises(ValueError, match="link must be one of"):
        losses.simpo(chosen, rejected, link="ipo")


@pytest.mark.parametrize("a", [-30.0, -0.5, 0.0, 2.0])
def test_fdpo_divergences(a):
    chosen, rejected = answers(a), answers(0.3)
    score = {
        "reverse_kl": lambda x: x,
        "forward_kl": lambda x: 1 - math.exp(-x),
        "js": lambda x: math.log(2) - math.log1p(math.exp(-x)),
        "alpha": lambda x: (1 - math.exp(-0.3 * x)) / 0.3,
    }
    slope = {
        "reverse_kl": lambda x: 1.0,
        "forward_kl": lambda x: math.exp(-x),
        "js": lambda x: 1 / (1 + math.exp(x)),
        "alpha": lambda x: math.exp(-0.3 * x),
    }
    for name, phi in score.items():
        loss = losses.fdpo(chosen, rejected, divergence=name, alpha=0.3)
        m = 0.1 * (phi(a) - phi(0.3))
        assert loss.item() == pytest.approx(max(-m, 0.0) + math.log1p(math.exp(-abs(m))), rel=1e-9)
        push = 0.1 / (1 + math.exp(m)) if m < 700 else 0.0
        good, bad = gradients(loss, chosen, rejected)
        assert good.item() == pytest.approx(-push * slope[name](a), rel=1e-9)
        assert bad.item() == pytest.approx(push * slope[name](0.3), rel=1e-9)


def test_relations_between_losses():
    chosen, rejected, third = answers(1.0, -2.0), answers(0.0, 1.0), answers(-1.0, 0.5)
    assert torch.equal(losses.fdpo(chosen, rejected), losses.dpo(chosen, rejected))
    assert torch.allclose(
        losses.tpo_l(chosen, rejected, third, beta=2.0, gamma=0.5), losses.simpo(chosen, rejected)
    )
    assert torch.equal(
        losses.rpo_seq(chosen, rejected, beta=0.3), losses.dpo(chosen, rejected, beta=0.3)
    )
    half = losses.soft_label(chosen, rejected, pref_prob=torch.tensor([1.0, 1.0]))
    assert torch.equal(half, losses.dpo(chosen, rejected))
    assert torch.allclose(
        losses.robust(chosen, rejected, label_smoothing=0.0), losses.dpo(chosen, rejected)
    )
    # one pair: optimal transport is DPO
    one = (chosen.index(slice(0, 1)), rejected.index(slice(0, 1)))
    for paired in (True, False):
        assert torch.allclose(losses.aot(*one, beta=0.1, paired=paired), losses.dpo(*one))
    # LCPO's contrast is the base loss with the label reversed less the base loss
    for base, fn in (
        ("dpo", losses.dpo),
        ("ipo", lambda *s, beta: losses.ipo(*s, beta=beta, norm="sum")),
    ):
        contrast = fn(rejected, chosen, beta=0.2) - fn(chosen, rejected, beta=0.2)
        w = torch.sigmoid(contrast + math.log(9.0)).detach()
        want = links.logistic(contrast, w, 1 - w)
        assert torch.allclose(losses.lcpo(chosen, rejected, beta=0.2, base=base), want)
    flagged = losses.selfie(
        chosen,
        rejected,
        mix_chosen_logps=chosen.logp,
        mix_rejected_logps=rejected.logp,
        threshold=1e9,
    )
    assert torch.allclose(flagged, losses.dpo(chosen, rejected, label_smoothing=0.1))


def test_aot_sends_gradients_through_the_sort():
    chosen, rejected = answers(3.0, -1.0), answers(0.0, 0.0)
    rejected = rejected._replace(ref_logp=rejected.ref_logp - torch.tensor([0.0, 5.0]))
    loss = losses.aot(chosen, rejected, beta=0.5, paired=False)
    u, v = sorted(chosen.logratio.tolist()), sorted(rejected.logratio.tolist())
    want = [math.log1p(math.exp(-0.5 * (a - b))) for a, b in zip(u, v, strict=True)]
    assert loss.tolist() == pytest.approx(want)
    good, _ = gradients(loss, chosen, rejected)
    assert good[1].item() == pytest.approx(-0.5 / (1 + math.exp(0.5 * (u[0] - v[0]))))


def test_beta_dpo_selection_prefers_average_margins():
    n = 4000
    chosen, rejected = answers(*torch.linspace(-4, 4, n).tolist()), answers(*[0.0] * n)
    state = beta_dpo.BetaState(mean=0.0, std=1.0)
    keep = beta_dpo.select(
        chosen, rejected, state, rho=0.5, generator=torch.Generator().manual_seed(1)
    )
    gap = (chosen.logratio - rejected.logratio).detach()
    assert keep.sum().item() == n // 2
    assert keep[gap.abs() < 0.5].double().mean() > 0.9 and keep[gap.abs() > 3].double().mean() < 0.1
    one = (answers(1.0), answers(0.0))
    assert beta_dpo.select(*one, state).tolist() == [True]
    assert beta_dpo.update(state, *one).std == 1.0
    nothing = losses.beta_dpo(*one, keep=torch.tensor([False]))
    assert nothing.tolist() == [0.0]


def test_bco_weights_and_one_label():
    assert density_weight(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.5, 1.0, 10.0])
    seq = answers(1.0, -2.0)
    bad = torch.tensor([False, False])
    plain = losses.bco(seq, desirable=bad, delta=0.0)
    factor = torch.tensor([2.0, 3.0])
    weighted = losses.bco(seq, desirable=bad, delta=0.0, undesirable_weight=factor)
    assert torch.allclose(weighted, plain * factor)


def test_kto_labels_and_baseline():
    seq = answers(1.0, -2.0)
    for label in (torch.tensor([1.0, float("nan")]), torch.tensor([1, 0])):
        with pytest.raises(ValueError, match="desirable must be a bool tensor"):
            losses.kto(seq, desirable=label, kl_baseline=0.0)
    with pytest.raises(ValueError, match="desirable must be a tensor, got list"):
        losses.kto(seq, desirable=[True, False], kl_baseline=0.0)
    with pytest.raises(ValueError, match=r"desirable must be \[2\]"):
        losses.kto(seq, desirable=torch.tensor([True]), kl_baseline=0.0)
    label = torch.tensor([True, False])
    with pytest.raises(ValueError, match="kl_baseline must be a number"):
        losses.kto(seq, desirable=label, kl_baseline=torch.zeros(2))
    with pytest.raises(ValueError, match="must be >= 0"):
        losses.kto(seq, desirable=label, kl_baseline=0.0, desirable_weight=-1.0)
    with pytest.raises(ValueError, match="at least one"):
        kl_baseline(seq.index(slice(0, 0)))
    assert kl_baseline(answers(-3.0, 1.0)).item() == 0.0  # clamped after averaging
    assert not kl_baseline(answers(3.0, 1.0)).requires_grad
    moving = torch.tensor(0.5, requires_grad=True)
    losses.kto(seq, desirable=label, kl_baseline=moving).sum().backward()
    assert moving.grad is None  # the baseline is a constant


def test_pro_supervised_term():
    logp = torch.tensor([-3.0, -5.0, -4.0, -2.0, -6.0], dtype=torch.float64, requires_grad=True)
    length = torch.tensor([3.0, 0.0, 2.0, 1.0, 2.0], dtype=torch.float64)
    labels = torch.tensor([0.2, 5.0, 0.9, 0.4, 0.4], dtype=torch.float64)
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    scores = logp / length.clamp(min=1)
    loss = losses.pro(scores, labels, cu, logp=logp, length=length, sft_weight=0.05)
    ranking = losses.pro(scores, labels, cu, length=length, sft_weight=0.0)
    # The empty response is out: two are left, the best has logp -4. The second group is all equal.
    assert (loss - ranking).tolist() == pytest.approx([0.05 * 1 * 4.0, 0.0])
    gap = 0.7
    a = scores.tolist()
    assert ranking[0].item() == pytest.approx(math.log1p(math.exp(gap * a[0] - gap * a[2])))
    with pytest.raises(ValueError, match="needs logp"):
        losses.pro(scores, labels, cu)
    with pytest.raises(ValueError, match="sft_weight must be a finite number >= 0"):
        losses.pro(scores, labels, cu, sft_weight=-1.0)


BAD_PAIR_ARGUMENTS = [
    ("dpo", dict(beta=0.0), "beta must be a finite number > 0"),
    ("dpo", dict(beta=float("nan")), "beta must be a finite number > 0"),
    ("dpo", dict(label_smoothing=0.6), r"\[0, 0.5\]"),
    ("ipo", dict(norm="token"), "norm must be one of"),
    ("robust", dict(label_smoothing=0.5), r"\[0, 0.5\)"),
    ("exo_pair", dict(label_smoothing=0.0), r"\(0, 0.5\]"),
    ("discopop", dict(tau=1.5), r"\(0, 1\]"),
    ("tdpo2", dict(alpha=-1.0), "alpha must be >= 0"),
    ("sparsepo", dict(kl_direction="fkl"), "kl_direction must be one of"),
    ("sparsepo", dict(kl_sign=2), "kl_sign"),
    ("fdpo", dict(divergence="kl"), "divergence must be one of"),
    ("fdpo", dict(alpha=2.0), r"alpha must be in \[0, 1\]"),
    ("madpo", dict(rm_margin=torch.zeros(2), c_max=0.9), "c_min < 1 < c_max"),
    ("madpo", dict(rm_margin=torch.zeros(3)), "rm_margin must be"),
    ("lcpo", dict(eta=1.0), r"eta must be in \(0, 1\)"),
    ("lcpo", dict(base="simpo"), "base must be one of"),
    ("dpop", dict(lam=-1.0), "lam must be a finite number >= 0"),
    ("beta_dpo", dict(keep=torch.ones(2), ema=1.0), r"ema must be in \[0, 1\)"),
    ("soft_label", dict(pref_prob=0.5), "pref_prob must be a tensor"),
    (
        "modpo",
        dict(margin_reward_chosen=torch.zeros(2), margin_reward_rejected=torch.zeros(2)),
        "margin_reward",
    ),
    (
        "selfie",
        dict(mix_chosen_logps=torch.zeros(2), mix_rejected_logps=torch.zeros(2), alpha=0.7),
        "alpha",
    ),
]


@pytest.mark.parametrize(
    ("name", "arguments", "message"), BAD_PAIR_ARGUMENTS, ids=lambda v: str(v)[:30]
)
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        losses.LOSSES[name](answers(1.0, 2.0), answers(0.0, 1.0), **arguments)


@pytest.mark.parametrize(
    "name",
    # tokenwise losses take tokens, diffusion ones errors, and gkd's beta may be 0: own tests
    [
        n
        for n, r in losses.LOSSES.items()
        if "beta" in inspect.signature(r.fn).parameters
        and r.family not in ("tokenwise", "diffusion")
        and n != "gkd"
    ],
)
@pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")
def test_every_beta_must_be_positive(name):
    record = losses.LOSSES[name]
    bound = losses.bind(record, {}, supplied=losses.required(record))
    assert bound.hyper["beta"] > 0
    side = answers(1.0, 2.0)
    call = {
        "pairwise": lambda: record(*[side] * len(record.rows), **extra, beta=-1.0),
        "pointwise": lambda: record(side, **extra, beta=-1.0),
        "listwise": lambda: record(
            side.logratio, torch.ones(2), torch.tensor([0, 2]), **extra, beta=-1.0
        ),
    }[record.family]
    extra = {
        k: torch.ones(2, dtype=torch.bool if k == "desirable" else torch.float64)
        for k in record.extra
    }
    with pytest.raises(ValueError, match="beta must be"):
        call()
