"""lcpo around every base against the same formulas in mpmath: two base losses, their difference,
the posterior and the logistic loss of it, written out from the base loss alone."""

from __future__ import annotations

import inspect

import mpmath as mp
import pytest
import torch

from prefkern import LOSSES, SeqStats, losses
from prefkern.losses.pairwise import lcpo

mp.mp.dps = 30
LOGP = ([-14.0, -29.5, -7.25, 0.0], [-21.0, -9.5, -8.0, -3.0])
REF = ([-15.5, -28.0, -7.0, 0.0], [-19.0, -11.0, -8.5, -2.5])
LENGTH = ([7.0, 3.0, 12.0, 0.0], [5.0, 9.0, 2.0, 4.0])  # an empty answer has mean 0
ETA = [0.9, 0.6, 0.3, 0.99]


def rows(**changes) -> list[SeqStats]:
    made = []
    for logp, ref, length in zip(LOGP, REF, LENGTH, strict=True):
        columns = [torch.tensor(c, dtype=torch.float64) for c in (logp, ref, length)]
        made.append(SeqStats(columns[0].requires_grad_(), *columns[1:])._replace(**changes))
    return made


def nll_sig(x):  # -log sigmoid(x)
    return mp.log(1 + mp.exp(-x))


def ipo_mean(w, o, i, beta=0.1):
    (rw, ro), (nw, no) = ((x[0][i], x[1][i]) for x in (REF, LENGTH))
    return ((w - rw) / max(nw, 1) - (o - ro) / max(no, 1) - 1 / (2 * mp.mpf(beta))) ** 2


def ipo_sum(w, o, i, beta=0.01):
    return ((w - REF[0][i]) - (o - REF[1][i]) - 1 / (2 * mp.mpf(beta))) ** 2


def dpo(w, o, i, beta=0.01):
    return nll_sig(mp.mpf(beta) * ((w - REF[0][i]) - (o - REF[1][i])))


def simpo(w, o, i, beta=2.0, gamma_beta_ratio=0.25):
    means = w / max(LENGTH[0][i], 1) - o / max(LENGTH[1][i], 1)
    return nll_sig(mp.mpf(beta) * (means - mp.mpf(gamma_beta_ratio)))


def cpo(w, o, i, beta=0.1):
    return nll_sig(mp.mpf(beta) * (w - o))


def reversed_label(base, w, o, i, **args):
    """The base loss with the answers exchanged, their references and lengths with them."""
    for columns in (REF, LENGTH):
        columns[0][i], columns[1][i] = columns[1][i], columns[0][i]
    try:
        return base(o, w, i, **args)
    finally:
        for columns in (REF, LENGTH):
            columns[0][i], columns[1][i] = columns[1][i], columns[0][i]


CASES = [
    ("lcpo", dpo, lcpo.update, {}, {}),
    ("lcpo", ipo_sum, lcpo.update, {"base": "ipo"}, {"beta": 0.5}),
    ("lcpo", ipo_mean, lcpo.update, {"base": "ipo", "norm": "mean"}, {"beta": 0.1}),
    ("lcpo_simpo", simpo, lcpo.update_simpo, {}, {}),
    ("lcpo_simpo", simpo, lcpo.update_simpo, {}, {"beta": 3.0, "gamma_beta_ratio": 0.8}),
    ("lcpo_cpo", cpo, lcpo.update_cpo, {}, {}),
    ("lcpo_cpo", cpo, lcpo.update_cpo, {}, {"beta": 0.4}),
]


@pytest.mark.parametrize(("name", "base", "update", "own", "args"), CASES)
def test_values_gradients_and_reliability(name, base, update, own, args):
    pair = rows() if LOSSES[name].needs_reference else rows(ref_logp=None)
    eta = torch.tensor(ETA, dtype=torch.float64)
    found = LOSSES[name](*pair, eta=eta, **own, **args)
    found.sum().backward()
    posterior = []
    for i in range(4):
        at = (mp.mpf(LOGP[0][i]), mp.mpf(LOGP[1][i]))

        def contrast(w, o, i=i):
            return reversed_label(base, w, o, i, **args) - base(w, o, i, **args)

        p, e = 1 / (1 + mp.exp(-contrast(*at))), mp.mpf(ETA[i])
        right = p * e / (p * e + (1 - p) * (1 - e))

        def value(w, o, right=right, contrast=contrast):  # the posterior is a constant
            d = contrast(w, o)
            return right * nll_sig(d) + (1 - right) * nll_sig(-d)

        assert found[i].item() == pytest.approx(float(value(*at)), rel=1e-11)
        for side, order in enumerate([(1, 0), (0, 1)]):
            slope = float(mp.diff(value, at, order))
            assert pair[side].logp.grad[i].item() == pytest.approx(slope, rel=1e-9, abs=1e-13)
        first = mp.mpf("0.7")
        posterior.append(p * first / (p * first + (1 - p) * (1 - first)))
    wanted = 0.75 * 0.7 + 0.25 * float(sum(posterior)) / 4
    moved = update(0.7, *(row.map(torch.Tensor.detach) for row in pair), ema=0.25, **own, **args)
    assert moved == pytest.approx(wanted, rel=1e-11)
    assert update(0.7, *(row.index(slice(0, 0)) for row in pair), **own, **args) == 0.7


def test_defaults_are_those_of_the_base_and_of_the_update():
    for name, base in (("lcpo_simpo", "simpo"), ("lcpo_cpo", "cpo")):
        record, plain = LOSSES[name], LOSSES[base]
        assert not record.needs_reference
        for argument in ("beta", "gamma_beta_ratio"):
            found = {inspect.signature(f).parameters.get(argument)
                     for f in (record.fn, record.update, plain.fn)}  # fmt: skip
            assert len({None if p is None else p.default for p in found}) == 1
    assert losses.LOSSES["lcpo_cpo"].supervised == LOSSES["cpo"].supervised


def test_only_means_ask_for_lengths():
    assert LOSSES["lcpo"].reads(base="ipo", norm="mean") == ("logp", "length")
    assert LOSSES["lcpo"].reads() == ("logp",)
    losses.lcpo(*rows(length=None), base="ipo")


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("lcpo", {"norm": "mean"}, 'norm="mean" is for base="ipo"'),
        ("lcpo", {"base": "simpo"}, "lcpo_simpo"),
        ("lcpo", {"base": "ipo", "norm": "token"}, "norm must be one of"),
        ("lcpo_simpo", {"gamma_beta_ratio": -0.1}, "gamma_beta_ratio must be a finite number >= 0"),
        ("lcpo_simpo", {"eta": 1.0}, "eta must be in"),
        ("lcpo_cpo", {"beta": 0.0}, "beta must be a finite number > 0"),
    ],
)
def test_bad_arguments(name, args, told):
    with pytest.raises(ValueError, match=told):
        LOSSES[name](*rows(), **args)
