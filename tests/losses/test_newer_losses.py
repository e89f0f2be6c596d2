"""Newer losses and weight stages, uni_dpo to iw_opd, against the same formulas in mpmath.

Values and derivatives at 30 digits, each written out here from the paper's or the code's terms.
"""

from __future__ import annotations

import functools

import mpmath as mp
import pytest
import torch

from prefkern import SeqStats, TokenStats, losses, preference_loss
from prefkern.losses import weights

mp.mp.dps = 30
P = 4
G = torch.Generator().manual_seed(11)


def draw(low, high, n=P):
    return low + (high - low) * torch.rand(n, generator=G, dtype=torch.float64)


LENGTH = {
    "chosen": torch.tensor([7.0, 3.0, 12.0, 1.0]),
    "rejected": torch.tensor([5.0, 9.0, 2.0, 4.0]),
}
LOGP = {side: draw(-30.0, -5.0) for side in LENGTH}
REF = {side: draw(-30.0, -5.0) for side in LENGTH}


def sig(x):
    return 1 / (1 + mp.exp(-x))


def nll_sig(x):  # -log sigmoid(x)
    return mp.log(1 + mp.exp(-x))


def uni(
    i, w, o, rw, ro, *, beta=2.0, eta=0.1, gamma=1.0, tau_ref=0.8, nll_weight=0.01, tau_good=7.0,
    length_norm=True,
):  # fmt: skip
    if length_norm:
        nw, no = (mp.mpf(float(LENGTH[s][i])) for s in ("chosen", "rejected"))
        w, o, rw, ro = w / nw, o / no, rw / nw, ro / no
    good, bad = float(SCORES[0][i]), float(SCORES[1][i])
    value = sig(eta * (good - bad)) * (1 - sig(beta * (w - o) - tau_ref)) ** gamma
    value *= nll_sig(beta * ((w - o) - (rw - ro)))
    return value - nll_weight * (w if rw > w and good >= tau_good else 0)


def focal(i, w, o, rw, ro, *, beta=0.1, gamma=0.05):
    m = beta * ((w - rw) - (o - ro))
    return sig(m) ** gamma * nll_sig(m)


def shifted(i, w, o, rw, ro, *, beta=0.1, shift=0.95):
    return nll_sig(beta * ((w - rw) - shift * (o - ro)))


SCORES = (torch.tensor([8.0, 6.0, 9.0, 7.0]), torch.tensor([5.0, 5.5, 2.0, 7.0]))
CASES = [
    ("uni_dpo", uni, {}), ("uni_dpo", uni, {"gamma": 3.0, "tau_ref": 2.0, "eta": 0.7}),
    ("uni_dpo", uni, {"length_norm": False, "beta": 0.1, "nll_weight": 0.5}),
    ("focal_po", focal, {}), ("focal_po", focal, {"gamma": 2.0, "beta": 0.5}),
    ("dpo_shift", shifted, {}), ("dpo_shift", shifted, {"shift": 0.5, "beta": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "formula", "args"), CASES)
def test_pair_losses(name, formula, args):
    rows = {
        side: SeqStats(
            logp=LOGP[side].clone().requires_grad_(), ref_logp=REF[side], length=LENGTH[side]
        )
        for side in LOGP
    }
    extra = dict(zip(("score_chosen", "score_rejected"), SCORES, strict=True))
    found = getattr(losses, name)(
        rows["chosen"], rows["rejected"], **args, **(extra if name == "uni_dpo" else {})
    )
    found.sum().backward()
    numbers = [[mp.mpf(float(x)) for x in t[side]] for t in (LOGP, REF) for side in LENGTH]

    def value(i, w, o):
        return formula(i, w, o, numbers[2][i], numbers[3][i], **args)

    for i in range(P):
        at = (numbers[0][i], numbers[1][i])
        assert found[i].item() == pytest.approx(float(value(i, *at)), rel=1e-12)
        for side, order in (("chosen", (1, 0)), ("rejected", (0, 1))):
            slope = mp.diff(functools.partial(value, i), at, order)
            assert rows[side].logp.grad[i].item() == pytest.approx(
                float(slope), rel=1e-10, abs=1e-14
            )


def test_limits_are_dpo():
    rows = [SeqStats(logp=LOGP[s], ref_logp=REF[s], length=LENGTH[s]) for s in LOGP]
    plain = losses.dpo(*rows)
    torch.testing.assert_close(losses.focal_po(*rows, gamma=0.0), plain, rtol=1e-14, atol=0)
    torch.testing.assert_close(losses.dpo_shift(*rows, shift=1.0), plain, rtol=1e-14, atol=0)


CU = torch.tensor([0, 4, 4, 9, 11], dtype=torch.int32)
SCORED = torch.tensor([0, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1], dtype=torch.bool)


def test_weights_of_decay():
    found = weights.d2po(CU, SCORED, decay=0.9).weights
    wanted = [0, 1, 0.9, 0.81, 0, 1, 0, 0.9, 0.81, 1, 0.9]
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64))


def test_weights_of_selection():
    """The two most telling of three scored tokens: the highest of a chosen answer (sign 1), the
    lowest of a rejected one."""
    oracle = torch.tensor([9.0, -1.0, -2.0, -3.0, 9.0, -1.0, 9.0, -2.0, -3.0, -1.0, -2.0])
    sign = torch.tensor([1.0] * 4 + [-1.0] * 5 + [1.0] * 2)
    found = weights.sepo(oracle, torch.zeros(11), sign, SCORED, CU, keep=0.5).weights
    wanted = torch.tensor([0, 0.5, 0.5, 0, 0, 0, 0, 0.5, 0.5, 1.0, 0])
    torch.testing.assert_close(found.float(), wanted)
    with pytest.raises(ValueError, match="keep must be in"):
        weights.sepo(oracle, torch.zeros(11), sign, SCORED, CU, keep=0.0)


def test_weights_of_the_prefix():
    logp = -draw(0.1, 4.0, 11)
    ref = -draw(0.1, 4.0, 11)
    found = weights.iw_opd(logp, ref, SCORED, CU, gamma=0.6)
    exact = weights.iw_opd(logp, ref, SCORED, CU, gamma=0.6, divergence="rkl")
    assert set(found.weights) == {"logp"} and set(exact.weights) == {"rkl"}
    for a, b in zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True):
        places = [i for i in range(a, b) if SCORED[i]]
        gain = [mp.mpf(float(ref[i])) - mp.mpf(float(logp[i])) for i in places]
        for t, i in enumerate(places):
            w = 1 + mp.mpf(0.6) * (1 - sum(map(abs, gain[:t])) / sum(map(abs, gain)))
            assert found.weights["logp"][i].item() == pytest.approx(float(w * gain[t]), rel=1e-12)
            assert exact.weights["rkl"][i].item() == pytest.approx(float(w), rel=1e-12)
    assert (found.weights["logp"][~SCORED] == 0).all()
    same = weights.iw_opd(ref, ref, SCORED, CU, gamma=0.6, divergence="fkl").weights["fkl"]
    assert (same[SCORED] == 1.6).all()


def test_gamma_of_zero_is_plain_distillation():
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(3, 6, 8, generator=g, dtype=torch.float64)
    teacher = torch.randn(3, 6, 8, generator=g, dtype=torch.float64)
    head = torch.randn(40, 8, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 40, (3, 6), generator=g)
    both = [
        preference_loss(
            hidden, head, targets, loss=loss, ref_hidden=teacher, ref_head=head, **args
        )[0]
        for loss, args in (
            ("iw_opd", {"divergence": "rkl", "gamma": 0.0}), ("distill", {"divergence": "rkl"})
        )
    ]  # fmt: skip
    torch.testing.assert_close(*both, rtol=1e-12, atol=0)


def test_sampled_form_is_the_gradient_of_the_exact_one_in_the_mean():
    """Over all tokens of a vocabulary, weighted by their probability: score-function identity."""
    logits = draw(-2.0, 2.0, 6).requires_grad_()
    teacher = draw(-2.0, 2.0, 6).log_softmax(0)
    exact = torch.autograd.grad(
        (logits.softmax(0) * (logits.log_softmax(0) - teacher)).sum(), logits
    )[0]
    one = torch.tensor([0, 1], dtype=torch.int32)
    total = torch.zeros_like(exact)
    for token in range(6):
        logp = logits.log_softmax(0)[token : token + 1]
        w = weights.iw_opd(
            logp, teacher[token : token + 1], torch.ones(1, dtype=torch.bool), one, gamma=0.0
        ).weights["logp"]
        loss = losses.iw_opd(SeqStats(logp=w * logp, ref_logp=torch.zeros(1))).sum()
        total += logp.detach().exp() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(total, exact, rtol=1e-10, atol=1e-12)


def risk(generator, z, lam, s):
    r = mp.exp(z)
    h, slope = {
        "kliep": (lambda x: x * mp.log(x) - x, lambda x: mp.log(x)),
        "lsif": (lambda x: (x - 1) ** 2, lambda x: 2 * (x - 1)),
        "ba": (lambda x: (x ** (1 + lam) - x) / lam, lambda x: ((1 + lam) * x**lam - 1) / lam),
        "sba": (
            lambda x: (x ** (1 + lam) - x) / (s * lam * (1 + lam)),
            lambda x: ((1 + lam) * x**lam - 1) / (s * lam * (1 + lam)),
        ),
    }[generator]
    return slope(r) * r - h(r) - slope(1 / r)


@pytest.mark.parametrize("generator", ["sba", "ba", "kliep", "lsif", "logistic"])
@pytest.mark.parametrize("with_baseline", [False, True])
def test_token_ratio(generator, with_baseline):
    """Two pairs, the second without a token in common; constants of h are taken out at R = 1."""
    cu = torch.tensor([0, 4, 7, 9, 10], dtype=torch.int32)
    scored = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 1, 0], dtype=torch.bool)
    logp, ref = -draw(0.1, 4.0, 10), -draw(0.1, 4.0, 10)
    base = draw(-3.0, 3.0, 10)
    logp.requires_grad_()
    args = {"beta": 0.7, "lam": 0.3, "scale": 5.0, "generator": generator}
    call = {"scored": scored, "cu_groups": torch.tensor([0, 2, 4], dtype=torch.int32)}
    if with_baseline:
        call["baseline"] = base.clone().requires_grad_()
    found = losses.tbpo(TokenStats(logp=logp, ref_logp=ref), cu, **call, **args)
    pairs = [(1, 4), (2, 5)]  # t-th scored tokens of chosen and rejected
    w = [0.0, 0.0]
    if with_baseline:
        w = [float(base[r] - base[c]) for c, r in pairs]
        w = [min(1.0, max(-1.0, x - sum(w) / 2)) for x in w]

    def value(shift=0):  # of the first pair; shift of the chosen answer's second token
        total = mp.mpf(0)
        for (c, r), extra in zip(pairs, w, strict=True):
            delta = [mp.mpf(float(logp[i].detach())) - mp.mpf(float(ref[i])) for i in (c, r)]
            z = mp.mpf(0.7) * (delta[1] - delta[0] - (shift if c == 2 else 0) + extra)
            if generator == "logistic":
                total += mp.log(1 + mp.exp(z))
            else:
                at_one = risk(generator, mp.mpf(0), mp.mpf(0.3), mp.mpf(5))
                total += risk(generator, z, mp.mpf(0.3), mp.mpf(5)) - at_one
        return total / 2

    assert found.shape == (4,) and found[2:].tolist() == [0.0, 0.0]
    rest = losses.tbpo(TokenStats(logp=ref, ref_logp=ref), cu, **call | {"baseline": None}, **args)
    constant = 0 if generator == "logistic" else rest[0].item()
    assert found[0].item() - constant == pytest.approx(float(value()), rel=1e-10, abs=1e-12)
    assert found[0].item() == found[1].item()
    found.mean().backward()
    assert logp.grad[2].item() == pytest.approx(float(mp.diff(value, 0)) / 2, rel=1e-9)
    assert (logp.grad[[0, 3, 6, 7, 8, 9]] == 0).all()
    if with_baseline:
        assert call["baseline"].grad[[0, 3, 6, 7, 8, 9]].abs().max() == 0


def test_token_ratio_of_advantages():
    """delta + KL is log p - log r less its mean under r: the mean of the ratio's log is 0 there."""
    cu, groups = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    logits, ref = draw(-2.0, 2.0, 20).view(4, 5), draw(-2.0, 2.0, 20).view(4, 5).log_softmax(-1)
    targets = torch.tensor([[1], [4], [0], [2]])

    def stats(logits):
        p = logits.log_softmax(-1)
        return TokenStats(
            logp=p.gather(1, targets)[:, 0], ref_logp=ref.gather(1, targets)[:, 0],
            fkl=(ref.exp() * (ref - p)).sum(-1),
        )  # fmt: skip

    call = {"scored": torch.ones(4, dtype=torch.bool), "cu_groups": groups, "beta": 0.6}
    logits.requires_grad_()
    found = losses.tbpo(stats(logits), cu, **call, advantage=True, generator="logistic")
    gap = (
        logits - ref
    )  # its mean under the reference goes, so a constant per position does not count
    advantage = (gap - (ref.exp() * gap).sum(-1, keepdim=True)).gather(1, targets)[:, 0].tolist()
    want = sum(
        mp.log(1 + mp.exp(mp.mpf(0.6) * (mp.mpf(advantage[2 + t]) - mp.mpf(advantage[t]))))
        for t in range(2)
    ) / 2  # fmt: skip
    assert found[0].item() == pytest.approx(float(want), rel=1e-12)
    torch.autograd.gradcheck(
        lambda z: losses.tbpo(stats(z), cu, **call, advantage=True, lam=0.3).mean(), logits
    )
    with pytest.raises(ValueError, match="without a baseline"):
        losses.tbpo(stats(logits), cu, **call, advantage=True, baseline=torch.zeros(4))


def test_full_step():
    """Three answers in one group and a chosen one alone; the gradient is that of the plain sum."""
    cu = torch.tensor([0, 3, 6, 8, 10], dtype=torch.int32)
    groups = torch.tensor([0, 3, 4], dtype=torch.int32)
    scored = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    logp, ref, reward = -draw(0.1, 4.0, 10), -draw(0.1, 4.0, 10), draw(-2.0, 2.0, 10)
    logp.requires_grad_()
    args = {"beta": 0.3, "token_rate": 1.5, "reward_temp": 0.7}
    found = losses.full_step_dpo(
        TokenStats(logp=logp, ref_logp=ref), cu, scored=scored, cu_groups=groups,
        step_reward=reward, **args,
    )  # fmt: skip
    answers = [[i for i in range(cu[k], cu[k + 1]) if scored[i]] for k in range(3)]
    y = [mp.mpf(float(x.detach())) for x in logp]
    delta = [a - mp.mpf(float(b)) for a, b in zip(y, ref, strict=True)]

    def share(answer, sign):
        e = {i: mp.exp(sign * mp.mpf(0.7) * mp.mpf(float(reward[i]))) for i in answer}
        return {i: e[i] / sum(e.values()) * sig(-sign * mp.mpf(1.5) * delta[i]) for i in answer}

    total, grad = mp.mpf(0), [mp.mpf(0)] * 10
    for rejected in answers[1:]:
        gap = sum(delta[i] for i in answers[0]) - sum(delta[i] for i in rejected)
        g = sig(-mp.mpf(0.3) * gap)
        for sign, answer in ((1, answers[0]), (-1, rejected)):
            for i, w in share(answer, sign).items():
                total -= g * sign * w * y[i] / 2
                grad[i] -= g * sign * w / 2
    assert found[3].item() == 0.0
    assert found[:3].tolist() == pytest.approx([float(total)] * 3, rel=1e-12)
    found[0].backward()
    assert logp.grad.tolist() == pytest.approx([float(x) for x in grad], rel=1e-12, abs=0)


def test_scale_of_four_has_the_slope_of_dpo():
    cu, scored = torch.tensor([0, 1, 2], dtype=torch.int32), torch.ones(2, dtype=torch.bool)
    groups = torch.tensor([0, 2], dtype=torch.int32)
    slopes = []
    for generator in ("sba", "logistic"):
        logp = torch.full((2,), -1.0, dtype=torch.float64, requires_grad=True)
        stats = TokenStats(logp=logp, ref_logp=logp.detach())
        losses.tbpo(
            stats, cu, scored=scored, cu_groups=groups, generator=generator, lam=0.4
        ).mean().backward()
        slopes.append(logp.grad)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=0)


IN_GROUPS = ("tbpo", "full_step_dpo")
STEPS = torch.tensor([[1.0, 1.0, -1.0, -1.0, 0.5]] * 4)


@pytest.mark.parametrize(
    ("name", "args"),
    [("focal_po", {}), ("dpo_shift", {}), ("d2po", {}), ("tbpo", {}),
     ("tbpo", {"advantage": True}), ("full_step_dpo", {"step_reward": STEPS, "beta": 1.0})],
)  # fmt: skip
def test_a_few_steps_rank_the_chosen_answer_first(name, args):
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(4, 5, 8, generator=g)
    head = torch.nn.Linear(8, 30, bias=False)
    targets = torch.randint(0, 30, (4, 5), generator=g)
    ref_head = head.weight.detach().clone()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    groups = {"cu_groups": torch.tensor([0, 2, 4], dtype=torch.int32)} if name in IN_GROUPS else {}
    for _ in range(12):
        loss, _ = preference_loss(
            hidden, head, targets, loss=name, ref_hidden=hidden, ref_head=ref_head, **groups, **args
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, metrics = preference_loss(
        hidden, head, targets, loss="dpo", ref_hidden=hidden, ref_head=ref_head
    )
    assert metrics["rewards/accuracies"] == 1.0 and metrics["rewards/margins"] > 0.05


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda c, r: losses.dpo_shift(c, r, shift=0.0), "shift must be in"),
        (lambda c, r: losses.focal_po(c, r, gamma=-1.0), "gamma must be"),
        (lambda c, r: losses.uni_dpo(c, r, score_chosen=SCORES[0][:2], score_rejected=SCORES[1]),
         "score_chosen must be"),
    ],
)  # fmt: skip
def test_bad_arguments(call, told):
    rows = [SeqStats(logp=LOGP[s], ref_logp=REF[s], length=LENGTH[s]) for s in LOGP]
    with pytest.raises(ValueError, match=told):
        call(*rows)
