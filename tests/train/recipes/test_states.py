"""Losses with a memory: what a state gives, how it moves, that a killed run loses none of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_models import config, save_model, write_data

from prefkern.losses import LOSSES
from prefkern.losses.pairwise import lcpo
from prefkern.losses.pairwise.beta_dpo import BetaState, select
from prefkern.losses.pairwise.selfie import NO_DOUBT
from prefkern.stats import SeqStats
from prefkern.train import train
from prefkern.train.evaluate import evaluate
from prefkern.train.loop import train_run
from prefkern.train.providers import Micro
from prefkern.train.recipes.states import RULES, LossStates
from prefkern.train.run import Run, prepare


def seq(*logratios: float) -> SeqStats:
    logp = torch.tensor(logratios, dtype=torch.float64)
    return SeqStats(logp=logp, ref_logp=torch.zeros_like(logp), length=torch.ones_like(logp))


def ask(states: LossStates, name: str, *rows: SeqStats, names=None, training=True, **hyper):
    hyper = {"beta": 0.1} | hyper
    batch = SimpleNamespace(columns={} if names is None else {"annotator": names})
    return states.from_statistics(
        LOSSES[name], list(rows), hyper, Micro([], batch), training=training
    )


def states_of(name: str, *given: str, **loss_args) -> LossStates:
    columns = {argument: argument for argument in given}
    settings = config("out", "m", "d", loss=(name,), columns=columns, loss_args=loss_args, seed=3)
    return LossStates(settings, [LOSSES[name]])


def states_in(run: Run) -> LossStates:
    return next(p for p in run.providers if isinstance(p, LossStates))


def test_every_loss_with_a_state_has_a_rule():
    assert {name for name, record in LOSSES.items() if record.update is not None} == set(RULES)


def test_an_argument_that_a_loss_takes_too_reaches_it():
    """ema is beta_dpo's own argument and an option of lcpo's state."""
    pair = [LOSSES["beta_dpo"], LOSSES["lcpo"]]
    assert LossStates(config("out", "m", "d"), pair).takes == {"rho"}
    assert states_of("lcpo").takes == {"ema"}


def test_bco_delta_is_the_mean_of_all_rewards_so_far():
    states = states_of("bco")
    assert ask(states, "bco", seq(1.0, 3.0))["delta"] == pytest.approx(0.2)
    assert ask(states, "bco", seq(8.0))["delta"] == pytest.approx(0.4)  # 12 / 3 * 0.1
    assert ask(states, "bco", seq(99.0), training=False)["delta"] == pytest.approx(0.4)
    saved = {"updates": 2, "values": {"bco": (pytest.approx(0.4), 3)}}
    assert states.state() == {"losses": saved}
    assert ask(states_of("bco", delta=0.7), "bco", seq(1.0)) == {}  # the user's own


def test_beta_dpo_keeps_a_share_and_follows_the_margin():
    gaps = [0.3, -0.2, 0.1, 5.0, 0.0, 0.2, -0.1, 0.4, 0.1, 0.2]
    first = ask(states_of("beta_dpo"), "beta_dpo", seq(*gaps), seq(*[0.0] * 10), a=0.6, ema=0.9)
    assert (first["keep"] > 0).sum() == 8 and first["keep"].sum() == 10.0  # a mean over the kept
    assert first["gap_mean"] == 0.0 and first["a"] == 0.0
    states = states_of("beta_dpo", rho=0.5)
    again = ask(states, "beta_dpo", seq(*gaps), seq(*[0.0] * 10), a=0.6, ema=0.9)
    assert (again["keep"] > 0).sum() == 5
    kept = torch.tensor(gaps)[again["keep"] > 0].mean().item()
    assert again["beta"].item() == pytest.approx(0.1 * (1 + 0.6 * (kept - 0.06)), rel=1e-6)
    assert states.values["beta_dpo"].mean == pytest.approx(0.06)  # 0.1 * mean of 0.6
    fixed = ask(states, "beta_dpo", seq(*gaps), seq(*gaps), training=False, a=0.6, ema=0.9)
    assert fixed["keep"].tolist() == [1.0] * 10 and fixed["gap_mean"] == pytest.approx(0.06)
    assert states.metrics().keys() == {"state/gap_mean"}  # no beta of the batch before
    own = ask(states_of("beta_dpo", gap_mean=0.5), "beta_dpo", seq(1.0), seq(0.0), a=0.6, ema=0.9)
    assert own["beta"].item() == pytest.approx(0.1 * (1 + 0.6 * (1.0 - 0.9 * 0.5 - 0.1)))
    assert "gap_mean" not in own


def test_beta_dpo_moves_by_the_average_before_the_batch():
    """M = 0.9 * 0.2 + 0.1 * 1 after a state of 0.2; one pair is kept whatever the draw."""
    states = states_of("beta_dpo")
    states.values["beta_dpo"] = BetaState(0.2, 0.0)
    found = ask(states, "beta_dpo", seq(1.0), seq(0.0), a=0.6, ema=0.9)
    assert found["beta"].item() == pytest.approx(0.1 * (1 + 0.6 * (1.0 - 0.28)))
    assert found["gap_mean"] == 0.2 and states.values["beta_dpo"].mean == pytest.approx(0.28)


def test_every_update_of_beta_dpo_draws_anew():
    gaps = torch.linspace(-1.0, 1.0, 10).tolist()
    rows, kept = (seq(*gaps), seq(*[0.0] * 10)), []
    states = states_of("beta_dpo", rho=0.5)
    for count in range(2):
        kept.append(ask(states, "beta_dpo", *rows, a=0.6, ema=0.9)["keep"] > 0)
        generator = torch.Generator().manual_seed(3 * 1_000_003 + count)
        draw = select(*rows, states.values["beta_dpo"], rho=0.5, generator=generator)
        assert kept[count].tolist() == draw.tolist()
    assert kept[0].tolist() != kept[1].tolist()


def test_the_progress_of_a_run_stays_through_evaluation():
    states = states_of("selfie")
    assert states.progress == 1.0  # a model that is only evaluated
    states.begin_step([], 0.25)
    assert states.progress == 0.25
    states.begin_step([], None)
    assert states.progress == 0.25


def test_lcpo_learns_each_annotator():
    states, hyper = states_of("lcpo"), {"beta": 0.1, "base": "dpo", "eta": 0.9}
    rows = seq(20.0, -20.0, 20.0), seq(0.0, 0.0, 0.0)
    found = ask(states, "lcpo", *rows, names=["ann", "tom", "ann"], **hyper)
    assert found["eta"].tolist() == [0.9, 0.9, 0.9]  # before the batch
    after = states.values["lcpo"]
    mine = lcpo.update(0.9, seq(20.0, 20.0), seq(0.0, 0.0), beta=0.1)
    assert after["ann"] == pytest.approx(mine) and after["tom"] < 0.9 < after["ann"]
    found = ask(states, "lcpo", *rows, names=["tom", "zoe", "ann"], training=False, **hyper)
    assert found["eta"].tolist() == [after["tom"], 0.9, after["ann"]]


@pytest.mark.parametrize(
    ("name", "update", "hyper"),
    [
        ("lcpo_simpo", lcpo.update_simpo, {"beta": 2.0, "gamma_beta_ratio": 0.5}),
        ("lcpo_cpo", lcpo.update_cpo, {"beta": 0.1}),
        ("lcpo", lcpo.update, {"beta": 0.1, "base": "ipo", "norm": "mean"}),
    ],
)
def test_lcpo_learns_each_annotator_around_every_base(name, update, hyper):
    states = states_of(name, ema=0.3)
    rows = seq(2.0, -2.0, 3.0), seq(0.0, 0.0, 0.0)
    ask(states, name, *rows, names=["ann", "tom", "ann"], eta=0.9, **hyper)
    ann, tom = (seq(2.0, 3.0), seq(0.0, 0.0)), (seq(-2.0), seq(0.0))
    wanted = {n: update(0.9, *pair, ema=0.3, **hyper) for n, pair in (("ann", ann), ("tom", tom))}
    assert states.values[name] == pytest.approx(wanted)
    assert states.values[name]["tom"] < 0.9 < states.values[name]["ann"]


def test_selfie_doubts_nothing_at_first_and_then_the_lowest_margins():
    states, flat = states_of("selfie"), seq(0.0)
    states.progress = 0.1
    assert ask(states, "selfie", seq(4.0), flat)["threshold"] == NO_DOUBT
    states.progress = 0.5
    for logratio in (1.0, 2.0):
        ask(states, "selfie", seq(logratio), flat)
    found = ask(states, "selfie", seq(7.0), flat)
    assert found["threshold"] == pytest.approx(0.1 * 1.2)  # 10 % between 1, 2 and 4
    assert set(found) == {"threshold"}
    for _ in range(60):
        ask(states, "selfie", seq(9.0), flat)
    assert len(states.values["selfie"].margins) == 50


def test_selfie_doubts_by_the_margins_of_its_mixture():
    states = states_of("selfie", mixture=1.5)
    rows = [seq(2.0)._replace(mix=torch.tensor([m], dtype=torch.float64)) for m in (5.0, 1.0)]
    ask(states, "selfie", *rows, mixture=1.5)
    assert states.values["selfie"].margins == pytest.approx((0.1 * 4.0,))


class Killed(BaseException):
    """Stands for SIGKILL inside one process."""


@pytest.mark.parametrize(
    "names", [("bco",), ("beta_dpo", "lcpo", "selfie"), ("lcpo_cpo", "lcpo_simpo")], ids="-".join
)
def test_a_killed_run_keeps_its_states(tmp_path, monkeypatch, names):
    model = save_model(tmp_path / "model")
    data = write_data(tmp_path / "data.jsonl", "unpaired" if "bco" in names else "pairs", rows=11)
    common = dict(
        loss=names, per_device_train_batch_size=3, max_steps=7, save_steps=2, learning_rate=3e-3,
        resume_from_checkpoint="auto", gradient_accumulation_steps=2,
    )  # fmt: skip
    run = prepare(config(tmp_path / "whole", model, data, **common))
    whole = train_run(run)["log_history"]
    assert any(key.startswith("state/") for key in whole[-2])
    calls, original = [0], Run.micro_batch

    def micro_batch(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 10:  # in the middle of step 5
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(Run, "micro_batch", micro_batch)
    with pytest.raises(Killed):
        train(config(tmp_path / "broken", model, data, **common))
    monkeypatch.undo()
    again = prepare(config(tmp_path / "broken", model, data, **common))
    rows = train_run(again)["log_history"]
    assert states_in(again).state() == states_in(run).state()
    assert [r.get("loss") for r in rows] == [r.get("loss") for r in whole]
    files = [tmp_path / d / "model.safetensors" for d in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    saved = json.loads((tmp_path / "broken" / "checkpoint-6" / "prefkern_state.json").read_text())
    assert saved["losses"]["updates"] > 0


def test_evaluation_of_a_trained_model_reads_its_state(tmp_path):
    model, data = save_model(tmp_path / "model"), write_data(tmp_path / "d.jsonl", "unpaired")
    common = dict(loss=("bco",), loss_args={"beta": 1.0}, learning_rate=3e-3, save_steps=3)
    trained = train(config(tmp_path / "run", model, data, eval_dataset=data, **common))
    want = [row["eval_loss"] for row in trained["log_history"] if "eval_loss" in row][-1]
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-3"):
        run = prepare(
            config(tmp_path / "e", str(folder), data, ref_model=model, **common), training=False
        )
        assert states_in(run).values["bco"].count == 12
        assert evaluate(run, run.examples)["eval_loss"] == pytest.approx(want)
    both = LossStates(config("out", "m", "d"), [LOSSES["bco"], LOSSES["selfie"]])
    both.load_from(tmp_path / "run")  # what both have is taken over, the rest starts
    assert both.values["bco"].count == 12 and both.values["selfie"].margins == ()
