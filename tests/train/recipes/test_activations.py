"""Activations of the reference for mapo's mask."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from prefkern.integrations.head import at_head
from prefkern.train.recipes import activations


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activations_are_feature_means_of_every_place(family):
    model = tiny_model(family)
    ids = torch.randint(200, (2, 7))

    def hooks() -> int:  # transformers keeps hooks of its own after the first such forward
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def states_of() -> torch.Tensor:
        call = dict(input_ids=ids, output_hidden_states=True)
        return model(**call, at_head=lambda view: view.layers).value

    at_head(model)
    states_of()
    before = hooks()
    with torch.no_grad(), activations.record(model) as recorder:
        states = states_of()
    found = recorder.collect(states, torch.zeros(2, 7))
    counts = torch.bincount(found["hook_type"], minlength=4).tolist()
    # 2 blocks: an MLP each; query, key, value, output each; the embedding and every block; logits
    assert counts == [2, 8, 3, 1]
    assert found["activations"].shape == (14, 14)
    residual = found["activations"][found["hook_type"] == activations.RESIDUAL]
    assert torch.allclose(residual[1:], states.mean(-1).flatten(1))
    assert hooks() == before


def test_models_without_known_layers_are_refused():
    model = tiny_model("llama")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        for layer in model.model.layers:
            setattr(layer.self_attn, "x" + name, layer.self_attn._modules.pop(name))
    for layer in model.model.layers:
        layer.mlp.xdown = layer.mlp._modules.pop("down_proj")
    with pytest.raises(ValueError, match="mapo's mask"), activations.record(model):
        pass
