"""Terms of an objective: item weights, likelihood terms, labels and states, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from test_objective import B, Inputs

from prefkern import preference_loss
from prefkern.objective.preference_loss import loss_from_stats
from prefkern.stats import TokenStats

PAIRS = B // 2


def test_a_weight_of_0_hides_a_nan():
    """A pair that says nothing can be left out by its weight."""
    x = Inputs()
    logp, ref, _ = (t.detach() for t in x.full())
    broken = logp.clone()
    broken[2, 2] = math.nan  # of the second pair
    weights = torch.tensor([1.0, 0.0, 1.0])
    got = loss_from_stats(
        TokenStats(logp=broken, ref_logp=ref), x.targets, loss="dpo", item_weights=weights,
        metrics=False,
    )[0]  # fmt: skip
    want = loss_from_stats(
        TokenStats(logp=logp, ref_logp=ref), x.targets, loss="dpo", item_weights=weights
    )[0]
    assert torch.equal(got, want)


def test_item_weights_are_constants():
    x = Inputs()
    weights = torch.ones(PAIRS, requires_grad=True)
    x.call(loss="dpo", item_weights=weights, **x.ref)[0].backward()
    assert weights.grad is None and x.hidden.grad is not None


def test_relevance_of_another_size_is_refused():
    x = Inputs()
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"relevance must be \[S\] = \[6\]"):
        x.call(loss="plackett_luce", relevance=torch.zeros(5), cu_groups=cu, **x.ref)


# ---- likelihood terms ----------------------------------------------------------------------------


def test_a_likelihood_term_is_of_the_row_and_the_mean_that_the_loss_names():
    """cpo: tokens of the chosen answers; rpo's: their sums over pairs; asft: means per answer."""
    x = Inputs()
    logp = x.full()[0].detach()
    length = (x.targets != -100).sum(1)
    chosen, tokens = logp[::2].sum(1), length[::2]
    found = {
        name: x.call(loss=name, **(x.ref if name == "rpo" else {}))[1]["nll_loss"].item()
        for name in ("cpo", "rpo", "asft")
    }
    assert found["cpo"] == pytest.approx(-(chosen.sum() / tokens.sum()).item())
    assert found["rpo"] == pytest.approx(-chosen.mean().item())
    assert found["asft"] == pytest.approx(-(chosen / tokens).mean().item())
    ref = x.full()[1].detach()
    gold = loss_from_stats(  # a triple is two pairs here: its gold answer is the third
        TokenStats(logp=logp, ref_logp=ref), x.targets, loss="tpo",
    )[1]["nll_loss"].item()  # fmt: skip
    third = slice(2, None, 3)
    assert gold == pytest.approx(-(logp[third].sum() / length[third].sum()).item())
    more = x.call(loss="cpo", num_items={"tokens": 100})[1]["nll_loss"].item()
    assert more == pytest.approx(-chosen.sum().item() / 100)


def test_labels_of_a_likelihood_term():
    x = Inputs()
    wide = x.targets.clone()
    wide[:, 0] = 1
    with pytest.raises(ValueError, match="loss dpo has none; add 'sft'"):
        x.call(loss="dpo", likelihood_targets=wide, **x.ref)
    for label in (-100, 12 - int(x.targets[0, 3])):
        bad = wide.clone()
        bad[0, 3] = label
        with pytest.raises(ValueError, match=r"must equal targets where those are scored"):
            x.call(loss="cpo", likelihood_targets=bad)


def test_a_penalty_has_the_denominator_of_its_loss():
    x = Inputs()
    mask = torch.rand(x.targets.shape, generator=torch.Generator().manual_seed(0))
    masks = {"reward_mask": mask, "kl_mask": mask, "l1_norm_param_u": 0.1}

    def penalty(rows):
        given = {k: v[rows] if isinstance(v, torch.Tensor) else v for k, v in masks.items()}
        return preference_loss(
            x.hidden[rows], x.weight, x.targets[rows], loss="sparsepo", ref_head=x.ref_weight,
            ref_hidden=x.ref_hidden[rows], **given,
        )[1]["penalty"].item()  # fmt: skip

    each = [penalty(slice(i, i + 2)) for i in range(0, B, 2)]
    assert penalty(slice(None)) == pytest.approx(sum(each) / PAIRS) and min(each[:2]) > 0


def test_halves_are_pairs_in_another_order():
    """ld_dpo compares tokens up to the length that both answers of a pair have."""
    x = Inputs()
    order = [0, 2, 4, 1, 3, 5]
    pairs = x.call(loss="ld_dpo", **x.ref)[0]
    halves = preference_loss(
        x.hidden[order], x.weight, x.targets[order], loss="ld_dpo", layout="halves",
        ref_hidden=x.ref_hidden[order], ref_head=x.ref_weight,
    )[0]  # fmt: skip
    assert halves.item() == pytest.approx(pairs.item(), rel=1e-12)


def test_a_length_normalised_loss_logs_means():
    x = Inputs()
    logp, length = x.full()[0].detach().sum(1), (x.targets != -100).sum(1).clamp(min=1)
    found = x.call(loss="simpo")[1]
    assert found["logps/chosen"].item() == pytest.approx((logp / length)[::2].mean().item())


# ---- states and given arguments ------------------------------------------------------------------


def test_a_state_sees_numbers_and_what_it_says_stands():
    x = Inputs()
    seen = []

    def state(record, rows, hyper):
        seen.append((record.name, rows, hyper["beta"]))
        return {"delta": torch.tensor(0.25)}

    args = {"loss": "bco", "desirable": torch.tensor([True, False] * PAIRS), "beta": 0.3}
    got = x.call(state_arguments=state, **args, **x.ref)[0]
    ((name, rows, beta),) = seen
    assert (name, beta, len(rows)) == ("bco", 0.3, 1)
    assert not rows[0].logp.requires_grad
    assert torch.equal(got, x.call(delta=torch.tensor(0.25), **args, **x.ref)[0])
    again = x.call(state_arguments=state, delta=torch.tensor(9.0), **args, **x.ref)[0]
    assert torch.equal(again, got), "what a state says stands above what a call says"


def test_a_tensor_that_is_given_is_not_filled():
    x = Inputs()
    args = {
        "loss": "rrhf", "relevance": torch.tensor([2.0, 1.0, 0.0, 1.0, 0.0, 2.0]),
        "cu_groups": torch.tensor([0, 3, 6], dtype=torch.int32),
    }  # fmt: skip
    logp = x.full()[0].detach().sum(1)
    filled, given = x.call(**args)[0], x.call(logp=logp, **args)[0]
    assert filled.item() == pytest.approx(given.item())
    assert x.call(logp=2 * logp, **args)[0] != given
