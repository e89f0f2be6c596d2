"""A reference beside the policy: another model, the base of an adapter, an adapter of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from families import family_model
from head_batches import assert_same_gradients, batch, gradients

import prefkern
from prefkern.integrations.head import at_head
from prefkern.integrations.reference import frozen_view

peft = pytest.importorskip("peft")


def adapted(model, *names):
    """A PEFT model with an adapter of each name, all of them on the head too."""
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2 + seed, init_lora_weights=False,
            target_modules=["q_proj", "lm_head"],
        )  # fmt: skip
        if seed == 0:
            model = peft.get_peft_model(model, settings, adapter_name=name)
        else:
            model.add_adapter(name, settings)
    model.set_adapter(names[0])
    return model


def full_kl(model, reference_logits, inputs, targets):  # [B, T]
    logp = model(**inputs).logits.log_softmax(-1)
    logr = reference_logits.log_softmax(-1)
    kl = (logr.exp() * (logr - logp)).sum(-1)
    return torch.where(targets != -100, kl, 0.0)


def fused_kl(reference, targets):
    def compute(view):
        with reference.gathered() as head:
            return prefkern.linear_divergence(
                view.hidden, view.head, targets, reference.hidden, head, stats=("logp", "fkl")
            ).fkl

    return compute


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["model", "base of the adapter", "adapter"])
def test_kl_from_a_reference(family, packed, kind):
    inputs, targets = batch()
    policy = family_model(family)
    reference = family_model(family, seed=5)
    if kind != "model":
        policy = reference = adapted(policy, "default", "ref")
    with torch.no_grad():
        if kind == "adapter":
            policy.set_adapter("ref")
            logits = reference(**inputs).logits
            policy.set_adapter("default")
        elif kind == "model":
            logits = reference(**inputs).logits
        else:
            with policy.disable_adapter():
                logits = reference(**inputs).logits
    own = full_kl(policy, logits, inputs, targets)
    want = gradients(policy, own)

    at_head(policy, packed=packed)
    at_head(reference, packed=packed)
    with torch.no_grad():
        if kind == "adapter":
            policy.set_adapter("ref")
            kept = reference(**inputs, at_head=frozen_view).value
            policy.set_adapter("default")
        elif kind == "model":
            kept = reference(**inputs, at_head=frozen_view).value
        else:
            with policy.disable_adapter():
                kept = reference(**inputs, at_head=frozen_view).value
    got = policy(**inputs, at_head=fused_kl(kept, targets)).value
    assert own.max() > 0.1 and (got - own).abs().max() < 1e-4 * own.max()
    assert_same_gradients(gradients(policy, got), want, 1e-4)


def test_equal_models_give_exactly_zero():
    inputs, targets = batch(rows=2)
    policy = family_model("llama")
    reference = copy.deepcopy(policy).requires_grad_(False)
    at_head(policy)
    at_head(reference)
    kept = reference(**inputs, at_head=frozen_view).value

    def objective(view):
        with kept.gathered() as head:
            return prefkern.preference_loss(
                view.hidden, view.head, targets, loss=["tdpo2", "dpo"],
                ref_hidden=kept.hidden, ref_head=head,
            )  # fmt: skip

    loss, metrics = policy(**inputs, at_head=objective).value
    assert metrics["rewards/margins"] == metrics["kl/chosen"] == metrics["kl/rejected"] == 0
    assert abs(loss - 2 * torch.log(torch.tensor(2.0))) < 1e-6


def test_a_reference_whose_head_is_offloaded_is_refused():
    accelerate = pytest.importorskip("accelerate")
    inputs, targets = batch()
    policy, reference = family_model("llama"), family_model("llama", seed=5)
    at_head(policy)
    at_head(reference)
    accelerate.cpu_offload(reference, execution_device=torch.device("cpu"))
    with torch.no_grad():
        kept = reference(**inputs, at_head=frozen_view).value
    with pytest.raises(ValueError, match="reference's head is offloaded"):
        policy(**inputs, at_head=fused_kl(kept, targets))
