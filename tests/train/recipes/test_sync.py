"""A reference that moves while training: TR-DPO's soft and hard updates, and resuming them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import config, save_model, tiny_model, write_data

from prefkern.train import train
from prefkern.train.loop import train_run
from prefkern.train.recipes.sync import (
    check_movable,
    effective_parameters,
    extrapolate,
    soft_update,
)
from prefkern.train.run import prepare


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    return save_model(folder / "model"), write_data(folder / "pairs.jsonl")


def margins(result) -> list[float]:
    return [row["rewards/margins"] for row in result["log_history"] if "rewards/margins" in row]


def test_a_hard_update_makes_policy_and_reference_equal_again(tmp_path, materials):
    model, data = materials
    common = dict(max_steps=6, sync_ref_model=True, ref_model_sync_steps=2, eval_dataset=data)
    hard = train(config(tmp_path / "hard", model, data, ref_model_mixup_alpha=1.0, **common))
    # the step after an update starts from margins of exactly 0; the one between does not
    assert [margin == 0.0 for margin in margins(hard)] == [True, False] * 3
    # evaluation reads the same moved reference: the last update came after the last step
    assert hard["log_history"][-2]["eval_rewards/margins"] == 0.0


def test_a_soft_update_is_the_stated_mean(tmp_path, materials):
    model, data = materials
    settings = config(
        tmp_path, model, data, max_steps=1, sync_ref_model=True, ref_model_mixup_alpha=0.3,
        ref_model_sync_steps=1,
    )  # fmt: skip
    run = prepare(settings)
    before = {k: v.clone() for k, v in run.reference.model.named_parameters()}
    train_run(run)
    after = dict(run.step.policy.named_parameters())
    moved = dict(run.reference.model.named_parameters())
    for name, old in before.items():
        torch.testing.assert_close(moved[name], 0.7 * old + 0.3 * after[name].detach())
    assert any((moved[name] != old).any() for name, old in before.items())


def test_an_adapter_counts_with_its_weights(tmp_path, materials):
    model, data = materials
    common = dict(lora_r=4, max_steps=4, learning_rate=1e-2, sync_ref_model=True)
    run = prepare(
        config(tmp_path, model, data, ref_model_mixup_alpha=1.0, ref_model_sync_steps=2, **common)
    )
    assert run.facts["reference"] == "model"
    rows = margins(train_run(run))
    # merged and unmerged weights differ by rounding alone
    assert rows[1] != 0.0 and rows[2] == pytest.approx(0.0, abs=1e-4) and abs(rows[3]) > 1e-3
    merged = dict(run.step.policy.merge_and_unload().named_parameters())
    for name, value in run.reference.model.named_parameters():
        torch.testing.assert_close(value, merged[name])


def test_a_resumed_run_continues_with_the_moved_reference(tmp_path, materials):
    model, data = materials
    common = dict(
        max_steps=5, sync_ref_model=True, ref_model_mixup_alpha=0.5, ref_model_sync_steps=2,
        resume_from_checkpoint="auto",
    )  # fmt: skip
    whole = train(config(tmp_path / "whole", model, data, save_steps=3, **common))
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / "reference.safetensors").is_file()
    resumed = train(
        config(
            tmp_path / "resumed",
            model,
            data,
            **common | {"resume_from_checkpoint": str(checkpoint)},
        )
    )
    assert margins(resumed) == margins(whole)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"precomputed_ref": "c"}, "numbers of one that stands still"),
        ({"reference": "columns"}, "the columns hold"),
        ({"reference": "adapter", "lora_r": 2}, "reference=adapter has none"),
        ({"loss": ("simpo",)}, "has none"),
        ({"ref_model_mixup_alpha": 0.0}, r"\(0, 1\], got 0"),
        ({"ref_model_sync_steps": 0}, ">= 1"),
    ],
)
def test_what_cannot_move_is_refused(tmp_path, materials, changes, match):
    model, data = materials
    with pytest.raises(ValueError, match=match):
        prepare(config(tmp_path, model, data, sync_ref_model=True, **changes))


def test_models_that_do_not_match_are_refused_by_name():
    with pytest.raises(ValueError, match=r"architecture.*layers\.1"):
        check_movable(tiny_model(), tiny_model(num_hidden_layers=1))


def test_an_adapter_on_a_tied_head_has_no_place_in_the_plain_model():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    tied, plain = (tiny_model(tie_word_embeddings=flag) for flag in (True, False))
    policy = peft.get_peft_model(plain, settings)
    check_movable(policy, tiny_model(tie_word_embeddings=False))
    with pytest.raises(ValueError, match="lm_head has an adapter and shares its weight"):
        check_movable(peft.get_peft_model(tied, settings), tiny_model(tie_word_embeddings=True))


def test_extrapolation_and_copy_on_parameters():
    now, before, copy = tiny_model(seed=1), tiny_model(seed=0), tiny_model(seed=2)
    expected = {
        k: v + 0.3 * (v - effective_parameters(before)[k])
        for k, v in ((k, v.detach().clone()) for k, v in now.named_parameters())
    }
    extrapolate(now, before, 0.3)
    soft_update(copy, now, 1.0)
    for name, value in now.named_parameters():
        torch.testing.assert_close(value, expected[name])
        assert torch.equal(copy.get_parameter(name), value)
