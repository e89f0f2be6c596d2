"""Every loss through preference_loss on a tiny batch, and what the objective refuses."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace

import pytest
import torch
from loss_batch import Batch, S, T, V, cu

from prefkern import PreferenceLoss, SeqStats, losses, preference_loss, use_backend
from prefkern.backends import choice
from prefkern.backends.contract import Problem

pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")


@pytest.mark.parametrize("name", [n for n, r in losses.LOSSES.items() if r.family != "diffusion"])
def test_every_loss_through_preference_loss(name):
    record, batch = losses.LOSSES[name], Batch()
    loss, metrics = batch(name)
    assert loss.shape == () and loss.dtype == torch.float32 and torch.isfinite(loss)
    assert metrics and all(torch.isfinite(v) and not v.requires_grad for v in metrics.values())
    if not loss.requires_grad:
        pytest.fail(f"{name} gives no gradient")
    loss.backward()
    for leaf in (batch.hidden, batch.weight):
        assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0
    assert (batch.hidden.grad[batch.targets == -100] == 0).all()
    module = PreferenceLoss(record)
    assert name in repr(module)


def test_tokenwise_refusals():
    batch = Batch()
    with pytest.raises(ValueError, match="not linear in the tokens"):
        batch("grpo", token_weights=torch.ones(S, T))
    rest = {"cu_groups": None, "advantages": torch.ones(S)}
    with pytest.raises(ValueError, match="token by token"):
        preference_loss(
            batch.hidden, batch.weight, batch.targets, loss="grpo", ref_seq_logp=torch.zeros(S),
            **rest,
        )  # fmt: skip
    with pytest.raises(ValueError, match="needs a reference"):
        preference_loss(batch.hidden, batch.weight, batch.targets, loss="grpo", **rest)
    free, _ = preference_loss(
        batch.hidden, batch.weight, batch.targets, loss="grpo", beta=0.0, **rest
    )
    assert torch.isfinite(free)
    with pytest.raises(ValueError, match="cu_groups"):
        preference_loss(
            batch.hidden, batch.weight, batch.targets, loss="trpa", ref_hidden=batch.ref,
            preference_levels=torch.ones(S),
        )  # fmt: skip
    with pytest.raises(ValueError, match="whole distribution"):
        preference_loss(batch.hidden, batch.weight, batch.targets, loss="adpa")


def test_token_means_follow_the_given_count():
    batch = Batch(torch.float64)
    scored = int((batch.targets != -100).sum())
    for name in ("gkd", "entropy_bonus", "kl_penalty", "distill"):
        own, _ = batch(name)
        told, _ = batch(name, num_items={"scored_tokens": 2 * scored})
        torch.testing.assert_close(told * 2, own)


def test_weighted_sum_of_a_policy_loss_and_its_terms():
    batch = Batch(torch.float64)
    total, metrics = preference_loss(
        batch.hidden, batch.weight, batch.targets, ref_hidden=batch.ref,
        loss=["grpo", "entropy_bonus"], loss_weights=[1.0, 0.5], advantages=torch.ones(S).double(),
    )  # fmt: skip
    parts = metrics["loss/grpo"] + 0.5 * metrics["loss/entropy_bonus"]
    torch.testing.assert_close(total.detach(), parts)


def test_adpa_of_given_values_needs_no_reference():
    batch = Batch(torch.float64)
    values = torch.randn(V, dtype=torch.float64)
    loss, _ = preference_loss(
        batch.hidden, batch.weight, batch.targets, loss="adpa", values=values, sft_on_chosen=0.0
    )
    p = torch.softmax(batch.hidden @ batch.weight.T, -1)
    scored = (batch.targets != -100)[1::2]
    want = -((p[1::2] @ values) * scored).sum() / scored.sum()
    torch.testing.assert_close(loss, want)


# ---- whose argument is it ------------------------------------------------------------------------

HEADS = [n for n, r in losses.LOSSES.items() if r.family != "diffusion"]
OBJECTIVE = set(inspect.signature(preference_loss).parameters) - {"loss_args"}


@pytest.mark.parametrize("name", HEADS)
def test_no_argument_of_a_loss_is_taken_by_the_objective(name):
    """`backend` is for both; `desirable` and `cu_groups` are handed on under their own names."""
    shared = OBJECTIVE & set(losses.arguments(losses.LOSSES[name]))
    assert shared <= {"backend", "desirable", "cu_groups"}


@pytest.mark.parametrize("name", HEADS)
def test_every_number_reaches_the_loss(name):
    """Each hyper-parameter arrives at the function, the weight stage or the likelihood term."""
    record, batch = losses.LOSSES[name], Batch()
    numbers = {
        k: p.default
        for k, p in losses.arguments(record).items()
        if isinstance(p.default, (int, float)) and not isinstance(p.default, bool)
    }
    seen: dict = {}

    @functools.wraps(record.fn)
    def spy(*args, **kwargs):
        seen.update(kwargs)
        return record.fn(*args, **kwargs)

    stage = record.weights
    if stage is not None:

        @functools.wraps(stage)
        def spy_stage(*args, **kwargs):
            seen.update(kwargs)
            return record.weights(*args, **kwargs)

        stage = spy_stage
    watched = replace(record, fn=spy, weights=stage)
    for key, default in numbers.items():
        value = default if isinstance(default, int) else 0.9 * default + 0.01
        seen.clear()
        batch(name, watched, **{key: value})
        if record.supervised is not None and key == record.supervised.argument:
            known = losses.arguments(record)
            given = {k: v for k, v in batch.given(name).items() if k in known}
            bound = losses.bind(watched, {**given, key: value}, supplied=record.extra)
            assert bound.hyper[key] == value
        else:
            assert seen.get(key) == value, f"{key} did not arrive: {seen.keys()}"


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("approx_ndcg", {"temperature": 0.1}),
        ("neural_ndcg", {"temperature": 0.5}),
        ("rank_gap_hinge", {"scale": 2.0}),
        ("lipo", {"beta": 0.7}),
    ],
)
def test_a_list_loss_is_the_same_through_preference_loss_as_alone(name, args):
    """Arguments named like options of a head (temperature, scale) are the loss's own."""
    batch = Batch(torch.float64)
    relevance, groups = torch.tensor([2.0, 0.0, 1.0, 0.5, 0.5, 3.0]), cu(0, 3, 6)
    got, _ = batch(name, **args)
    record = losses.LOSSES[name]
    lp = torch.log_softmax(batch.hidden @ batch.weight.T, -1)
    lr = torch.log_softmax(batch.ref @ batch.weight.T, -1)
    scored, at = batch.targets != -100, batch.targets.clamp(min=0)[..., None]
    logp, ref = ((x.gather(-1, at)[..., 0] * scored).sum(1) for x in (lp, lr))
    seq = SeqStats(logp=logp, ref_logp=ref, length=scored.sum(1).double())
    extra = {"length": seq.length} if "length" in record.extra else {}
    alone = record(getattr(seq, record.score), relevance.double(), groups, **extra, **args)
    torch.testing.assert_close(got, alone.mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", HEADS)
def test_every_op_of_a_call_runs_on_the_backend_asked_for(name, monkeypatch):
    served = []
    select = choice.select_backend

    def spy(problem, backend="auto"):
        served.append((problem.op, select(problem, backend)))
        return served[-1][1]

    monkeypatch.setattr(choice, "select_backend", spy)
    loss, _ = Batch()(name, backend="eager")
    loss.backward()
    assert {backend for _, backend in served} == {"eager"}, served


def test_an_explicit_backend_ends_with_the_call():
    batch = Batch()
    batch("dpo", backend="eager")
    with use_backend("cpu"):
        batch("dpo", backend="eager")
        assert choice.select_backend(Problem("segment_sum", "cpu", torch.float32)) == "cpu"
