"""Images through DPOTrainer: TRL's steps on TRL's own vision path, and what goes beyond it."""

from __future__ import annotations

import pytest

trl = pytest.importorskip("trl")
pytest.importorskip("PIL")

import peft  # noqa: E402
import torch  # noqa: E402
import trl_images as images  # noqa: E402
import trl_runs as runs  # noqa: E402

from prefkern.integrations import trl as ours  # noqa: E402


def make(trainer, config, folder, *, data=None, lora=None, **options):
    policy, given = images.model(), {}
    if lora is None:
        given["ref_model"] = runs.perturbed(policy)
    else:
        torch.manual_seed(1)
        given["peft_config"] = peft.LoraConfig(
            task_type="CAUSAL_LM", init_lora_weights=False, target_modules=lora
        )
    settings = {
        "max_steps": 4, "learning_rate": 1e-4, "per_device_train_batch_size": 2, "max_length": None,
    }  # fmt: skip
    return trainer(
        model=policy,
        args=config(**runs.settings(folder, **settings | options)),
        train_dataset=images.pairs() if data is None else data,
        processing_class=images.processor(),
        **given,
    )


@pytest.mark.parametrize("lora", [None, r".*language_model.*q_proj"], ids=["full", "lora"])
def test_steps_equal_trls(tmp_path, lora):
    """By TRL's formula and by prefkern's; the vision tower's weights are among those compared."""
    want = make(trl.DPOTrainer, trl.DPOConfig, tmp_path, lora=lora)
    want.train()
    assert any("vision" in name for name, _ in want.model.named_parameters())
    for own in ({}, {"loss_type": "dpo", "loss_args": {"beta": 0.1}}):
        got = make(ours.DPOTrainer, ours.DPOConfig, tmp_path, lora=lora, **own)
        got.train()
        assert (got.plan is not None) == bool(own)
        runs.assert_same_runs(got, want)


def test_losses_that_trl_lacks_see_the_images_and_the_columns(tmp_path):
    """tdpo2 with an adapter on the head; weights of rows and of answers that stand in the data."""
    data = images.pairs(8, w=lambda i: 1.0 + i % 2)
    made = make(
        ours.DPOTrainer, ours.DPOConfig, tmp_path, data=data, loss_type="tdpo2",
        lora=["q_proj", "lm_head"], loss_columns={"item_weights": "w"},
    )  # fmt: skip
    made.train()
    rows = runs.history(made)
    assert len(rows) == 5 and all(
        torch.isfinite(torch.tensor(list(r.values()))).all() for r in rows
    )
    batch = made.data_collator([data[i] for i in range(4)])
    assert batch["pixel_values"].shape[0] == 4  # two of four rows have one, for both answers
    assert batch["loss_columns"]["item_weights"].tolist() == [1.0, 2.0, 1.0, 2.0]


def letters(completions, **_):
    return [sum(c in "aeiou" for c in said[0]["content"]) + 0.01 * i
            for i, said in enumerate(completions)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_steps_on_answers_of_its_own_equal_trls(tmp_path, name):
    """Two prompts with an image a step, generated answers, a KL to a reference that TRL loads from
    where the policy came from."""
    path = tmp_path / "model"
    images.model().save_pretrained(path)
    data = images.pairs(12).filter(lambda row: len(row["images"]) > 0)
    data = data.remove_columns(["chosen", "rejected"])
    settings = runs.settings(
        tmp_path, max_steps=4, learning_rate=1e-3, beta=0.1, num_generations=4,
        max_completion_length=6, per_device_train_batch_size=8,
    )  # fmt: skip
    settings.pop("max_length")

    def trained(library):
        made = getattr(library, f"{name}Trainer")(
            model=type(images.model()).from_pretrained(path), reward_funcs=letters,
            args=getattr(library, f"{name}Config")(**settings), train_dataset=data,
            processing_class=images.processor(),
        )  # fmt: skip
        seen = []
        made.model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
        made.train()
        return made, seen

    (got, mine), (want, theirs) = trained(ours), trained(trl)
    assert len(mine) == len(theirs) >= 8  # each step's answers and its loss look at images
    runs.assert_same_runs(got, want)


REFUSED = {
    "lists": (
        lambda: images.pairs(4, completions=lambda i: [0.0], scores=lambda i: [0.0]),
        dict(loss_type="lipo"), "more than two answers of a row, and rows with images are pairs",
    ),
    "numbers per token": (
        lambda: images.pairs(4, chosen_w=lambda i: [1.0, 2.0], rejected_w=lambda i: [1.0]),
        dict(loss_type="dpo", loss_columns={"pair_weight": "w"}), "none per token",
    ),
    "packing": (
        lambda: images.pairs(4), dict(loss_type="tdpo2", padding_free=True),
        "reads more than text and is not packed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    data, options, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        make(ours.DPOTrainer, ours.DPOConfig, tmp_path, data=data(), **options)
