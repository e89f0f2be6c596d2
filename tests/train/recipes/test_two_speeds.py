"""Two adapters at two speeds, changing places, resuming, and merging adapters of several runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import config, save_model, tiny_model, write_data
from tiny_tokenizer import byte_tokenizer

from prefkern.cli.main import main
from prefkern.train import models, train
from prefkern.train.loop import train_run
from prefkern.train.optimizer import make_optimizer
from prefkern.train.recipes import two_speeds as speeds
from prefkern.train.recipes.merge import merge_adapters
from prefkern.train.recipes.sync import effective_parameters
from prefkern.train.run import prepare
from prefkern.train.step import PreferenceStep

FILE = "adapter_model.safetensors"
PROVISIONAL = pytest.mark.filterwarnings("ignore:loss 'dpo_second_reference'")


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speeds")
    return save_model(folder / "model"), write_data(folder / "pairs.jsonl", rows=16)


def two_speeds(folder, materials, **options):
    common = dict(
        loss=("dpo_second_reference",), lora_r=4, learning_rate=1e-2, slow_learning_rate=1e-3,
        max_steps=4, max_grad_norm=0.0,
    )  # fmt: skip
    return config(folder, *materials, **common | options)


def logged(result, name) -> list[float]:
    return [row[name] for row in result["log_history"] if name in row]


@PROVISIONAL
def test_the_slow_adapter_is_plain_dpo_and_the_fast_one_runs_ahead(tmp_path, materials):
    result = train(two_speeds(tmp_path / "two", materials))
    train(
        two_speeds(
            tmp_path / "plain",
            materials,
            loss=("dpo",),
            learning_rate=1e-3,
            slow_learning_rate=None,
        )
    )
    slow = load_file(tmp_path / "two" / "slow" / FILE)
    plain = load_file(tmp_path / "plain" / FILE)
    assert slow.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(slow[name], value, rtol=1e-4, atol=1e-7)
    fast, behind = logged(result, "rewards/margins"), logged(result, "slow/rewards/margins")
    assert fast[0] == behind[0] == 0.0 and fast[-1] > 2 * behind[-1] > 0.0
    assert logged(result, "slow/swaps")[-1] == 0.0


@PROVISIONAL
def test_they_change_places_when_the_slow_one_overtakes(tmp_path, materials):
    run = prepare(
        two_speeds(tmp_path, materials, learning_rate=1e-4, slow_learning_rate=1e-2, max_steps=3)
    )
    result = train_run(run)
    assert run.step.speeds.swaps >= 1 and logged(result, "slow/swaps")[-1] >= 1.0
    # the overtaker is the one that counts from then on
    assert logged(result, "rewards/margins")[-1] > logged(result, "slow/rewards/margins")[-1]


@PROVISIONAL
def test_the_fast_adapter_chases_the_slow_ones_log_probabilities(tmp_path, materials, monkeypatch):
    run = prepare(two_speeds(tmp_path, materials))
    with torch.no_grad():
        for _, slow in speeds.adapter_pairs(run.step.policy):
            slow.add_(0.05)
    calls, forward = [], PreferenceStep.forward  # of the slow adapter, then of the fast one

    def noted(self, micro, reference, given, num_items):
        found = forward(self, micro, reference, given, num_items)
        calls.append((given, found[1]))
        return found

    monkeypatch.setattr(PreferenceStep, "forward", noted)
    examples = run.examples[:4]
    micro = run.micro_batch(examples)
    run.step(micro, *run.constants(micro), run.count_items(examples))
    (_, slow), (given, fast) = calls
    means = {side: given[f"slow_{side}_logps"].mean() for side in ("chosen", "rejected")}
    for side, mean in means.items():
        assert mean.item() == pytest.approx(slow[f"logps/{side}"].item(), rel=1e-5)
        assert mean.item() != pytest.approx(fast[f"logps/{side}"].item(), rel=1e-3)
    assert means["chosen"].item() != pytest.approx(means["rejected"].item(), rel=1e-2)


def test_the_count_of_exchanges_is_kept(tmp_path, materials):
    settings = two_speeds(tmp_path, materials)
    left, right = (speeds.TwoSpeeds(settings, []) for _ in range(2))
    left.swaps = 3
    left.save(tmp_path)
    right.load(tmp_path)
    assert right.swaps == 3


@PROVISIONAL
def test_an_exchange_takes_the_moments_along(tmp_path, materials):
    run = prepare(two_speeds(tmp_path, materials))
    optimizer = make_optimizer(run.step, run.config)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    pairs = speeds.adapter_pairs(run.step.policy)
    assert pairs and all(rates[id(f)] == 1e-2 and rates[id(s)] == 1e-3 for f, s in pairs)
    for number, both in enumerate(pairs):
        for side, parameter in enumerate(both):
            parameter.grad = torch.full_like(parameter, 1.0 + number + 100 * side)
    optimizer.step()
    before = [[(p.clone(), optimizer.state[p]["exp_avg"]) for p in both] for both in pairs]
    speeds.swap(run.step.policy, optimizer)
    for both, old in zip(pairs, before, strict=True):
        for parameter, (value, moment) in zip(both, old[::-1], strict=True):
            assert torch.equal(parameter, value)
            assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)


@PROVISIONAL
def test_resuming_and_rounds_keep_both(tmp_path, materials):
    common = dict(save_steps=2, max_steps=4, learning_rate=1e-3, slow_learning_rate=5e-3)
    train(two_speeds(tmp_path / "whole", materials, resume_from_checkpoint="auto", **common))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    train(
        two_speeds(tmp_path / "parts", materials, resume_from_checkpoint=str(checkpoint), **common)
    )
    for name in (FILE, f"slow/{FILE}"):
        whole, parts = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole), name
    assert json.loads((checkpoint / speeds.FILE).read_text())["swaps"] >= 1
    result = train(two_speeds(tmp_path / "rounds", materials, num_rounds=2, max_steps=2))
    # the reference of the second round is the fast adapter; the slow one starts where it was
    second = next(row for row in result["log_history"] if row["round"] == 1)
    assert second["rewards/margins"] == 0.0 and second["slow/rewards/margins"] != 0.0
    assert (tmp_path / "rounds" / "slow" / FILE).is_file()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lora_r": 0}, "set lora_r"),
        ({"loss": ("dpo",)}, "needs loss dpo_second_reference"),
        ({"gradient_checkpointing": True}, "under the other adapter"),
        ({"sync_ref_model": True, "reference": "model"}, "two moving references"),
    ],
)
def test_contradictions_are_refused(tmp_path, materials, changes, match):
    with pytest.raises(ValueError, match=match):
        prepare(two_speeds(tmp_path, materials, **changes))


def test_whole_modules_beside_the_adapter_are_refused():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    policy = peft.get_peft_model(tiny_model(), settings)
    with pytest.raises(ValueError, match=r"whole modules \(lm_head\)"):
        speeds.add_slow_adapter(policy, Path("none"))


def test_adapters_merge_to_their_mean_and_need_one_base(tmp_path, materials):
    peft = pytest.importorskip("peft")
    model, data = materials
    settings, folders = config(tmp_path, model, data), [tmp_path / "one", tmp_path / "two"]
    for rank, folder in enumerate(folders, 1):
        lora = peft.LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(models.load_causal_lm(model, settings), lora)
        adapted.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    merged = merge_adapters(folders, tmp_path / "merged")
    one, two, found = (
        effective_parameters(models.load_model(str(name), settings)) for name in (*folders, merged)
    )
    name = next(name for name in one if "q_proj" in name)
    assert (one[name] - two[name]).abs().max() > 1e-3
    torch.testing.assert_close(found[name], (one[name] + two[name]) / 2, rtol=1e-5, atol=1e-6)
    about = folders[1] / "adapter_config.json"
    other = json.loads(about.read_text()) | {"base_model_name_or_path": save_model(tmp_path / "b")}
    about.write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"different base models: \[.*model.*, .*b.*\]"):
        merge_adapters(folders, tmp_path / "none")


def test_adapters_of_two_domains_merge_exactly(tmp_path, materials, capsys):
    model, data = materials
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        other = write_data(tmp_path / f"{seed}.jsonl", seed=seed + 5)
        train(config(folder, model, other, lora_r=3 + seed, learning_rate=1e-2, seed=seed))
    out = str(tmp_path / "merged")
    assert main(["merge", *folders, "--output-dir", out, "--weights", "0.7", "0.3"]) == 0
    assert capsys.readouterr().out.strip().endswith(out)
    settings = config(tmp_path, model, data)
    one, two, merged = (
        effective_parameters(models.load_model(name, settings)) for name in (*folders, out)
    )
    base = dict(models.load_model(model, settings).named_parameters())
    changed = 0
    for name, value in base.items():
        expected = value + 0.7 * (one[name] - value) + 0.3 * (two[name] - value)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)
        changed += int((expected - value).abs().max() > 1e-4)
    assert changed >= 10
    for weights, match in (([1.0], "one number per adapter"), (None, "at least two")):
        with pytest.raises(ValueError, match=match):
            merge_adapters(folders[: 2 if weights else 1], out, weights)
    with pytest.raises(ValueError, match="holds no adapter"):
        merge_adapters([folders[0], model], out)
