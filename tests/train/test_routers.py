"""Router losses of mixtures in the own trainer: what they add to a step, and what is logged."""

from __future__ import annotations

import pytest
import torch
from families import family_model
from tiny_models import config, save_model, write_data
from tiny_tokenizer import byte_tokenizer

from prefkern.train import train
from prefkern.train.forward import inputs_of
from prefkern.train.run import Run, prepare

COEFFICIENT = 0.5


@pytest.fixture
def materials(tmp_path):
    model = family_model("mixtral")
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = COEFFICIENT
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model"), write_data(tmp_path / "pairs.jsonl")


def run_of(tmp_path, materials, **options) -> Run:
    return prepare(config(tmp_path / "out", *materials, loss=("dpo",), **options))


def gradients(run: Run, value: torch.Tensor) -> dict[str, torch.Tensor]:
    run.step.zero_grad()
    value.backward()
    found = run.step.policy.named_parameters()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in found}


@pytest.mark.parametrize("packing", ["on", "off"])
def test_a_micro_batch_adds_its_share_of_the_models_own_aux_loss(tmp_path, materials, packing):
    run = run_of(tmp_path, materials, packing=packing)
    assert run.packed == (packing == "on")
    policy, micro = run.step.policy, run.micro_batch(run.examples[:3])
    items = run.count_items(run.examples[:12])  # of 12 pairs this micro-batch has 3
    reference, given = run.constants(micro)
    with inputs_of(policy, micro.batch) as inputs:
        own = policy(**inputs, output_router_logits=True, use_cache=False).aux_loss
    want = gradients(run, COEFFICIENT * 3 / 12 * own)
    assert any("gate" in name and value.abs().max() > 1e-4 for name, value in want.items())

    loss, found = run.step(micro, reference, given, items)
    assert found["aux_loss"] == pytest.approx(own.item(), rel=1e-5)
    got = gradients(run, loss)
    policy.config.router_aux_loss_coef = 0.0
    plain, _ = run.step(micro, reference, given, items)
    without = gradients(run, plain)
    assert (loss - plain).item() == pytest.approx(COEFFICIENT * 3 / 12 * own.item(), rel=1e-5)
    scale = max(value.abs().max() for value in want.values())
    for name, value in want.items():
        assert ((got[name] - without[name]) - value).abs().max() < 1e-4 * scale, name


def test_accumulation_averages_and_the_log_has_it(tmp_path, materials):
    """At step 0 policy equals reference, so the loss is log 2 and the routers' term."""
    model, data = materials
    options = dict(loss=("dpo",), max_steps=1, packing="off", per_device_train_batch_size=3)
    settings = config(tmp_path / "out", model, data, gradient_accumulation_steps=4, **options)
    row = train(settings)["log_history"][0]
    assert row["aux_loss"] > 0.5
    assert row["loss"] == pytest.approx(0.6931472 + COEFFICIENT * row["aux_loss"], abs=1e-5)


def test_without_router_logits_there_is_no_term(tmp_path, materials):
    run = run_of(tmp_path, materials)
    run.step.policy.config.output_router_logits = False
    micro = run.micro_batch(run.examples[:3])
    loss, found = run.step(micro, *run.constants(micro), run.count_items(micro.examples))
    assert "aux_loss" not in found and loss.item() == pytest.approx(0.6931472, abs=1e-6)


def test_a_model_without_such_a_loss_is_refused(tmp_path, materials):
    model = save_model(tmp_path / "dense", output_router_logits=True)
    run = prepare(config(tmp_path / "out", model, materials[1], loss=("dpo",)))
    micro = run.micro_batch(run.examples[:3])
    with pytest.raises(ValueError, match="LlamaForCausalLM was asked for router logits"):
        run.step(micro, *run.constants(micro), run.count_items(micro.examples))
