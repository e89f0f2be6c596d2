"""Loading: adapters as asked for, frozen models, dropout switched off everywhere, hashes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import config, save_model, tiny_model
from torch import nn

from prefkern.train import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "m", attention_dropout=0.2)


def test_an_adapter_has_the_rank_and_scale_of_the_options(folder):
    policy = models.load_policy(config("o", folder, "d", lora_r=3, lora_alpha=12), None)
    settings = policy.peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (3, 12, 0.0)
    trainable = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable) and policy.training
    assert not any("lm_head" in name for name in trainable)
    again = models.load_policy(config("o", folder, "d", lora_r=3, lora_alpha=12), None)
    for one, other in zip(policy.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)  # the adapter starts the same whatever was drawn before


def test_a_checkpoint_takes_the_place_of_the_model(folder, tmp_path):
    other = save_model(tmp_path / "checkpoint", seed=5)
    settings = config("o", folder, "d")
    policy = models.weights_hash(models.load_policy(settings, tmp_path / "checkpoint"))
    assert policy == models.weights_hash(models.load_model(other, settings))
    assert policy != models.weights_hash(models.load_model(folder, settings))


def test_a_frozen_model_neither_learns_nor_drops():
    model = models.freeze(tiny_model().train())
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("disable", [True, False])
def test_dropout_in_modules_and_in_attributes(disable, tmp_path):
    folder = save_model(tmp_path / "gpt2", "gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)
    policy = models.load_policy(config("o", folder, "d", disable_dropout=disable), None)
    found = [m.p for m in policy.modules() if isinstance(m, nn.Dropout)]
    assert found and all(p == (0.0 if disable else 0.3) for p in found)
    folder = save_model(tmp_path / "llama", attention_dropout=0.2)
    llama = models.load_policy(config("o", folder, "d", disable_dropout=disable), None)
    attributes = [layer.self_attn.attention_dropout for layer in llama.model.layers]
    assert attributes == [0.0 if disable else 0.2] * 2


def test_the_compute_type(folder):
    for bf16, want in ((True, torch.bfloat16), (False, torch.float32)):
        with models.autocast(config("o", folder, "d", bf16=bf16), "cpu"):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == want


def test_context_lengths_by_any_name():
    assert models.context_length(tiny_model()) == 128
    assert models.context_length(tiny_model("gpt2")) == 128
    assert models.context_length(tiny_model("mpt")) == 128
