"""Hyper-parameters out of range are told before any model runs, in the words of the first step."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from loss_batch import Batch
from loss_examples import EVERY

import prefkern
from prefkern import losses
from prefkern.losses import binding, rehearsal
from prefkern.losses.declare import pairwise

module = importlib.import_module("prefkern.objective.preference_loss")
ODD = (-1.0, 0.0, 1.5, math.nan, math.inf, -3)


def numbers_of(name):
    """Hyper-parameters of a loss that are numbers and have a default."""
    inputs = losses.LOSSES[name].inputs
    return [
        argument for argument, parameter in inputs.arguments.items()
        if parameter.default is not parameter.empty
        and {"float", "int"} & set(inputs.kinds[argument].parts)
    ]  # fmt: skip


def told(call):
    """The text of a ValueError, None where there is none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def bound(name, given):
    return losses.bind(name, given, supplied=losses.required(name))


@pytest.mark.parametrize("name", EVERY)
def test_every_loss_can_be_tried_before_a_run(name):
    bound(name, {})
    assert losses.LOSSES[name] in rehearsal._forms


@pytest.mark.parametrize("name", [n for n in EVERY if losses.LOSSES[n].family != "diffusion"])
def test_what_the_first_step_refuses_is_refused_before(name, monkeypatch):
    batch, before = Batch(), {}
    cases = [(argument, value) for argument in numbers_of(name) for value in ODD]
    for argument, value in cases:
        before[argument, value] = told(lambda a=argument, v=value: bound(name, {a: v}))
        if not math.isfinite(value):
            assert before[argument, value]
    monkeypatch.setattr(binding, "rehearse", lambda record, hyper: None)
    for case in cases:
        late = told(lambda case=case: batch(name, **dict([case])))
        if late is not None:
            assert (before[case] or "").endswith(late), (case, late)


def test_nothing_is_computed_before(monkeypatch):
    def computed(*args, **kwargs):
        raise AssertionError("a statistic was computed")

    monkeypatch.setattr(module, "token_statistics", computed)
    with pytest.raises(ValueError, match=r"^loss 'dpo': beta must be a finite number > 0, got -1"):
        Batch()("dpo", beta=-1.0)
    with pytest.raises(ValueError, match="loss 'distill'"):
        Batch()("distill", loss="distill:divergence=alpha,order=2")
    with pytest.raises(ValueError, match="gamma_beta_ratio must be a finite number, got nan"):
        Batch()("simpo", gamma_beta_ratio=math.nan)
    with pytest.raises(ValueError, match="loss_weights must be finite numbers"):
        Batch()("simpo", loss_weights=[math.inf])


def test_the_module_says_so_when_it_is_made():
    with pytest.raises(ValueError, match="label_smoothing"):
        prefkern.PreferenceLoss("dpo", label_smoothing=0.7)
    with pytest.raises(ValueError, match="alpha"):
        prefkern.PreferenceLoss(["dpo", "ld_dpo"], alpha=2.0)
    prefkern.PreferenceLoss("kto", desirable_weight=0.5)  # its tensors come with a call


def test_a_call_of_the_function_refuses_what_is_no_number():
    rows = [prefkern.SeqStats(logp=torch.zeros(2), length=torch.ones(2))] * 2
    with pytest.raises(ValueError, match=r"loss 'simpo': gamma_beta_ratio must be a finite number"):
        losses.simpo(*rows, gamma_beta_ratio=math.inf)


def test_random_numbers_and_settings_stay(monkeypatch):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    with torch.device("meta"):
        bound("beta_dpo", {"beta": 0.21})
        bound("lipo", {"beta": 0.21})
    assert torch.equal(torch.rand(3), want) and torch.is_grad_enabled()
    monkeypatch.setattr(rehearsal, "_MOST", 2)
    for k in range(5):
        bound("dpo", {"beta": 0.1 + k})
    assert len(rehearsal._passed) <= 2


def test_a_loss_of_the_callers_with_inputs_of_its_own_is_not_tried():
    @pairwise(source="this test", status="checked", reference=False)
    def odd_rows(
        chosen: prefkern.SeqStats,
        rejected: prefkern.SeqStats,
        *,
        beta: float = 0.1,
    ) -> torch.Tensor:
        """Wants three rows.

        l = -beta (logp(chosen) - logp(rejected))

        This test.
        """
        if chosen.logp.numel() % 3:
            raise ValueError("three rows")
        return beta * (rejected.logp - chosen.logp)

    assert bound("odd_rows", {"beta": -4.0}).hyper == {"beta": -4.0}
    losses.LOSSES._found.pop("odd_rows")


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("modpo", {"w": [0.5, 0.3, 0.2]}),  # as many rewards as further objectives
        ("sparsepo", {"rw_kl_independent": False}),  # one mask, the other None
        ("oreo", {"level": "step"}),  # step_index, which the other levels do without
    ],
)
def test_values_that_ask_for_tensors_of_another_form_pass(name, args):
    losses.bind(name, args, supplied=losses.required(name))
    with pytest.raises(ValueError, match="beta"):
        losses.bind(name, {**args, "beta": -1.0}, supplied=losses.required(name))
