"""What stands between ops and losses: which of several losses speaks, whose argument wins, which
reference and which statistics are taken, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from test_objective import B, Inputs, T

import prefkern
from prefkern import PreferenceLoss
from prefkern.objective import models
from prefkern.objective.preference_loss import loss_from_stats


def numbers(metrics):
    return {name: value.item() for name, value in metrics.items()}


def test_metrics_are_of_the_first_loss():
    x = Inputs()
    both = x.call(loss=["dpo", "simpo"], loss_weights=[1.0, 0.5], **x.ref)[1]
    alone = x.call(loss="dpo", **x.ref)[1]
    assert {k: v for k, v in numbers(both).items() if k in alone} == numbers(alone)
    assert both.keys() - alone.keys() == {"loss/dpo", "loss/simpo"}


def test_without_metrics_there_are_no_parts_either():
    x = Inputs()
    assert x.call(loss=["dpo", "simpo"], metrics=False, **x.ref)[1] == {}


def test_parts_of_a_loss_are_logged_and_not_weighted():
    x = Inputs()
    loss, metrics = x.call(loss="cpo", cpo_alpha=0.5)
    plain = x.call(loss="cpo", cpo_alpha=0.0)[0]
    assert metrics["nll_loss"] > 0 and not metrics["nll_loss"].requires_grad
    torch.testing.assert_close(loss.detach(), plain.detach() + 0.5 * metrics["nll_loss"])


def test_prompts_of_a_likelihood_term_stay_out_of_the_margin():
    x = Inputs()
    wide = x.targets.clone()
    wide[:, :2] = 3
    metrics = x.call(loss="cpo", likelihood_targets=wide)[1]
    narrow = x.call(loss="cpo")[1]
    for name in ("rewards/margins", "logps/chosen", "logps/rejected", "entropy"):
        assert metrics[name].item() == pytest.approx(narrow[name].item()), name
    assert metrics["nll_loss"] != narrow["nll_loss"]


def test_arguments_of_a_call_win_over_those_of_the_module():
    x = Inputs()
    module = PreferenceLoss("dpo", beta=0.1)
    got = module(x.hidden, x.weight, x.targets, beta=0.7, **x.ref)[0]
    assert torch.equal(got, x.call(loss="dpo", beta=0.7, **x.ref)[0])


# ---- the reference -------------------------------------------------------------------------------


def test_nothing_is_read_of_a_reference_on_ignored_tokens():
    x = Inputs()
    clean = x.full()[1].detach()
    dirty = torch.where(x.targets == -100, math.nan, clean)
    want = x.call(loss="dpo", ref_logp=clean)
    got = x.call(loss="dpo", ref_logp=dirty)
    assert torch.equal(got[0], want[0]) and numbers(got[1]) == numbers(want[1])


@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_a_reference_is_a_constant(loss):
    x = Inputs()
    given = {**x.ref, "ref_hidden": x.ref_hidden.clone().requires_grad_()}
    with pytest.raises(ValueError, match="ref_hidden must not require grad"):
        x.call(loss=loss, **given)


def test_a_reference_of_another_shape():
    x = Inputs()
    with pytest.raises(ValueError, match="ref_logp must have the shape of targets"):
        x.call(loss="dpo", ref_logp=torch.zeros(T, B, dtype=torch.float64))


def test_statistics_for_the_log_are_asked_for_where_there_is_one(monkeypatch):
    asked = []
    op = models.linear_logps

    def seen(*args, stats=("logp",), **more):
        asked.append(set(stats))
        return op(*args, stats=stats, **more)

    monkeypatch.setattr(models, "linear_logps", seen)
    x = Inputs()
    x.call(loss="simpo", metrics=False)
    x.call(loss="simpo")
    assert asked == [{"logp"}, {"logp", *models.LOGGED}]


# ---- statistics that come from elsewhere ---------------------------------------------------------


def given(dtype=torch.float64, **more):
    x = Inputs(dtype)
    logp, ref, fkl = (t.detach() for t in x.full())
    return prefkern.TokenStats(**({"logp": logp, "ref_logp": ref, "fkl": fkl} | more)), x.targets


def test_a_loss_from_statistics_has_their_dtype():
    for dtype in (torch.float32, torch.float64):
        tokens, targets = given(dtype)
        assert loss_from_stats(tokens, targets, loss="tdpo2")[0].dtype == dtype


def test_statistics_that_are_missing_or_do_not_fit():
    tokens, targets = given(ref_logp=None)
    with pytest.raises(ValueError, match=r"needs the token statistics \['ref_logp'\]"):
        loss_from_stats(tokens, targets, loss="dpo")
    tokens, targets = given()
    with pytest.raises(ValueError, match=r"tokens\.fkl must have the shape of targets"):
        loss_from_stats(tokens._replace(fkl=tokens.fkl.T), targets, loss="tdpo2")
