"""A run that stops and resumes is the run that did not; what is saved loads without prefkern."""

from __future__ import annotations

import pytest

trl = pytest.importorskip("trl")

import torch  # noqa: E402
import trl_runs as runs  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from prefkern.integrations import trl as ours  # noqa: E402


def make(folder, loss, **options):
    policy = runs.model()
    return ours.DPOTrainer(
        model=policy,
        ref_model=runs.perturbed(policy),
        args=ours.DPOConfig(
            **runs.settings(
                folder, loss_type=loss, max_steps=6, save_strategy="steps", save_steps=3, **options
            )
        ),
        train_dataset=runs.pairs(),
        processing_class=runs.tokenizer(),
    )


@pytest.mark.parametrize("loss", ["sigmoid", "tdpo2", "sparsepo", "beta_dpo", "bco"])
def test_resumed_is_uninterrupted(tmp_path, loss):
    whole = make(tmp_path / "whole", loss)
    whole.train()
    resumed = make(tmp_path / "resumed", loss)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for a, b in zip(runs.history(resumed)[:-1], runs.history(whole)[:-1], strict=True):
        del a["num_tokens"], b["num_tokens"]  # TRL counts from the resumed step on
        assert a == b
    for (name, p), q in zip(
        resumed.model.named_parameters(), whole.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name


def test_learned_masks_train_and_are_saved_beside_the_model(tmp_path):
    made = make(tmp_path, "sparsepo", mask_learning_rate=1e-2)
    masks = made._memory.masks
    before = {k: v.clone() for k, v in masks.state_dict().items()}
    made.train()
    assert any(not torch.equal(v, before[k]) for k, v in masks.state_dict().items())
    rates = {group.get("initial_lr", group["lr"]) for group in made.optimizer.param_groups}
    assert rates == {1e-3, 1e-2}
    made.save_model(str(tmp_path / "saved"))
    saved = load_file(str(tmp_path / "saved" / "masks.safetensors"))
    assert saved.keys() == before.keys()
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert torch.equal(loaded.lm_head.weight, made.model.lm_head.weight)
