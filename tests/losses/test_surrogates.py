"""Links and scores: derivative at 0 and at kinks, tails, errors."""

from __future__ import annotations

import math

import pytest
import torch

from prefkern.losses import links


def slope(fn, x, *args):
    leaf = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    value = fn(leaf, *args)
    return value.item(), torch.autograd.grad(value.sum(), leaf)[0].item()


@pytest.mark.parametrize(
    ("fn", "x", "args", "value", "derivative"),
    [
        (links.logistic, 0.0, (), math.log(2), -0.5),
        (links.logistic, -1e4, (), 1e4, -1.0),
        (links.logistic, 1e4, (), 0.0, 0.0),
        (links.logistic, 1e4, (1.0, 0.5), 5e3, 0.5),
        (links.smoothed_logistic, 0.0, (0.2,), math.log(2), 0.5 - 0.8),
        (links.hinge_loss, 1.0, (), 0.0, 0.0),
        (links.hinge_loss, 0.0, (), 1.0, -1.0),
        (links.squared, -3.0, (), 9.0, -6.0),
        (links.zero_one, 0.0, (), 0.5, -0.25),
        (links.zero_one, 40.0, (), math.exp(-40.0), -math.exp(-40.0)),
        (links.forward_kl_score, 0.0, (), 0.0, 1.0),
        (links.forward_kl_score, -1e4, (), 1 - math.exp(80.0), 0.0),
        (links.jensen_shannon_score, 0.0, (), 0.0, 0.5),
        (links.jensen_shannon_score, 1e4, (), math.log(2), 0.0),
        (links.alpha_score, 0.0, (0.5,), 0.0, 1.0),
        (links.alpha_score, 2.0, (0.0,), 2.0, 1.0),
        (links.alpha_score, 1e-9, (1.0,), 1e-9, 1.0),
        (links.log_odds, math.log(0.5), (), 0.0, 2.0),
        (links.log_odds, 0.0, (), -1e-6 - math.log(1e-6) + 5e-7, 0.0),
        (links.log_odds, -1e3, (), -1e3, 1.0),
        (links.clipped_gain, 0.0, (torch.tensor([2.0]), 0.2), -2.0, -2.0),
        (links.clipped_gain, 1.0, (torch.tensor([2.0]), 0.2), -2.4, 0.0),
        (links.clipped_gain, -1.0, (torch.tensor([-2.0]), 0.2), 1.6, 0.0),
        (links.clipped_gain, 1.0, (torch.tensor([-1.0]), 0.2), math.e, math.e),
        (links.clipped_gain, 1.0, (torch.tensor([0.0]), 0.2), 0.0, 0.0),
        (links.kl_estimate, -3.0, ("k1",), -3.0, 1.0),
        (links.kl_estimate, -3.0, ("k2",), 4.5, -3.0),
        (links.kl_estimate, -3.0, ("k3",), math.exp(3.0) - 4.0, 1.0 - math.exp(3.0)),
        (links.kl_estimate, 1e-9, ("k3",), 0.0, 1e-9),
        (links.kl_estimate, -1e4, ("k3",), math.exp(80.0) - 81.0, 0.0),
    ],
)
def test_value_and_derivative(fn, x, args, value, derivative):
    got = slope(fn, x, *args)
    assert got[0] == pytest.approx(value, rel=1e-9, abs=1e-15)
    assert got[1] == pytest.approx(derivative, rel=1e-9, abs=1e-15)


def test_logistic_keeps_its_digits_beyond_twenty():
    """torch's softplus turns linear at 20 and is 2e-9 off there."""
    x = torch.tensor([-25.0], dtype=torch.float64)
    assert links.logistic(x).item() == 25.0 + math.log1p(math.exp(-25.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [0.0, 1e4, -1e4])
def test_everything_is_finite_far_out(x, dtype):
    functions = [
        links.logistic,
        links.hinge_loss,
        links.squared,
        links.zero_one,
        links.forward_kl_score,
        links.jensen_shannon_score,
        lambda v: links.alpha_score(v, 0.3),
        links.log_odds,
        lambda v: links.clipped_gain(v, torch.ones_like(v), 0.2),
        lambda v: links.clipped_gain(v, -torch.ones_like(v), 0.2),
        lambda v: links.kl_estimate(v, "k3"),
    ]
    for fn in functions:
        leaf = torch.tensor([x], dtype=dtype, requires_grad=True)
        value = fn(leaf)
        assert value.dtype == dtype and torch.isfinite(value).all()
        assert torch.isfinite(torch.autograd.grad(value.sum(), leaf)[0]).all()


@pytest.mark.parametrize("eps", [-0.1, 0.6, float("nan")])
def test_label_smoothing_range(eps):
    with pytest.raises(ValueError, match=r"\[0, 0.5\]"):
        links.smoothed_logistic(torch.zeros(1), eps)
