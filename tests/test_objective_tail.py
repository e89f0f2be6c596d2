"""preference_loss: what its backward leaves out, and what is only logged."""

import pytest
import torch
from test_objective import D, Inputs

import prefkern
from prefkern import preference_loss


@pytest.mark.parametrize("loss", ["dpo", "tdpo2", "sft"])
def test_tail_mass_of_a_loss(loss):
    """The value is exact, the share is logged, and the gradient moves by about the mass."""
    x, vocabulary = Inputs(), 5 * 1024
    weight = torch.randn(vocabulary, D, generator=torch.Generator().manual_seed(3)).double()
    ref = {} if loss == "sft" else {"ref_hidden": 3.6 * x.hidden.detach(), "ref_head": weight}

    def gradient(mass):
        hidden = (4.0 * x.hidden).detach().requires_grad_()
        value, metrics = preference_loss(
            hidden, weight.clone().requires_grad_(), x.targets, loss=loss, tail_mass=mass, **ref
        )
        return value.item(), torch.autograd.grad(value, hidden)[0], metrics

    exact, full, metrics = gradient(0.0)
    assert "perf/active_share" not in metrics
    value, found, metrics = gradient(2.0**-8)
    assert value == exact and 0.2 <= metrics["perf/active_share"] < 1.0
    assert 0 < (found - full).norm() <= 2.0**-6 * full.norm()


def test_what_is_only_logged_has_no_gradient_row():
    """Entropy for the log next to a frozen head: the value is logged and no product is added."""
    x = Inputs(dtype=torch.float32)
    with torch.no_grad():
        want = prefkern.linear_logps(x.hidden, x.weight, x.targets, stats=("ent",)).ent
    mask = x.targets != -100
    loss, metrics = preference_loss(x.hidden, x.weight.detach(), x.targets, **x.ref)
    loss.backward()
    assert metrics["entropy"].item() == pytest.approx(want.sum().item() / mask.sum().item())
    plain = Inputs(dtype=torch.float32)
    preference_loss(plain.hidden, plain.weight.detach(), plain.targets, metrics=False, **plain.ref)[
        0
    ].backward()
    assert torch.equal(x.hidden.grad, plain.hidden.grad)
