"""The oracles themselves: closed-form gradients against central differences, limits, edge rows."""

from __future__ import annotations

import numpy as np
import oracles
import pytest

STATS = (
    "logp",
    "lse",
    "zy",
    "ent",
    "col",
    "fkl",
    "rkl",
    "jsd:0.5",
    "jsd:0.1",
    "alpha:0.5",
    "alpha:0.3",
    "renyi:0.5",
    "tv",
    "bkl:3",
    "mix:0.125",
    "ev",
)
rng = np.random.default_rng(5)
Z, ZR, A = rng.normal(size=9) * 2, rng.normal(size=9) * 2, rng.normal(size=9)


@pytest.mark.parametrize("stat", STATS)
def test_gradient_is_the_derivative(stat):
    _, grad = oracles.row_statistic(stat, Z, 4, ZR, A)
    step = 1e-5
    for v in range(Z.size):
        up, down = Z.copy(), Z.copy()
        up[v] += step
        down[v] -= step
        slope = (
            oracles.row_statistic(stat, up, 4, ZR, A)[0]
            - oracles.row_statistic(stat, down, 4, ZR, A)[0]
        ) / (2 * step)
        assert abs(slope - grad[v]) < 1e-9, f"{stat}: entry {v}"


@pytest.mark.parametrize("stat", STATS)
def test_padded_vocabulary_changes_nothing(stat):
    pad = np.full(3, -np.inf)
    value, grad = oracles.row_statistic(stat, Z, 4, ZR, A)
    wide, wide_grad = oracles.row_statistic(
        stat, np.concatenate([Z, pad]), 4, np.concatenate([ZR, pad]), np.concatenate([A, pad])
    )
    assert wide == pytest.approx(value, abs=1e-15)
    np.testing.assert_allclose(wide_grad[:9], grad, atol=1e-15)
    assert (wide_grad[9:] == 0).all()


def test_limits():
    fkl, rkl = (oracles.row_statistic(s, Z, 4, ZR)[0] for s in ("fkl", "rkl"))
    assert oracles.row_statistic("alpha:0.99999", Z, 4, ZR)[0] == pytest.approx(fkl, rel=1e-4)
    assert oracles.row_statistic("alpha:0.00001", Z, 4, ZR)[0] == pytest.approx(rkl, rel=1e-4)
    assert oracles.row_statistic("bkl:9", Z, 4, ZR)[0] == pytest.approx(fkl, abs=1e-14)


def test_head_gradient_is_the_derivative_of_the_weighted_sum():
    hidden, weight, bias = rng.normal(size=(4, 3)), rng.normal(size=(7, 3)), rng.normal(size=7)
    targets = np.array([2, -100, 6, 0])
    upstream = {"logp": rng.normal(size=4), "ent": rng.normal(size=4)}
    options = {"scale": 1.3, "softcap": 2.5, "temperature": 0.8}

    def total(h, w, b):
        values = oracles.head_stats(h, w, targets, ("logp", "ent"), bias=b, **options).values
        return sum((values[s] * upstream[s]).sum() for s in upstream)

    truth = oracles.head_stats(
        hidden, weight, targets, ("logp", "ent"), upstream, bias=bias, **options
    )
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        for at in np.ndindex(x.shape):
            before, step = x[at], 1e-5
            x[at] = before + step
            up = total(hidden, weight, bias)
            x[at] = before - step
            down = total(hidden, weight, bias)
            x[at] = before
            assert abs((up - down) / (2 * step) - truth.grads[name][at]) < 1e-8, (name, at)
