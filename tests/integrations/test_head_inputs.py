"""at_head: routers, images, padded vocabularies, packing and hidden states, against full logits."""

from __future__ import annotations

import pytest
import torch
from families import VOCAB, family_model
from head_batches import (
    assert_same_gradients,
    batch,
    fused_logps,
    gradients,
    own_logps,
)

from prefkern.integrations import packed_attention
from prefkern.integrations.head import at_head
from prefkern.integrations.head_view import shifted

peft = pytest.importorskip("peft")


# ---- what passes through -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("by", ["argument", "config"])
def test_router_losses(family, packed, by):
    model = family_model(family).train()
    inputs, targets = batch()
    more = {"output_router_logits": True} if by == "argument" else {}
    model.config.output_router_logits = by == "config"
    own = model(**inputs, **more)
    want = gradients(model, own_logps(own.logits, targets) + own.aux_loss)
    at_head(model, packed=packed)
    out = model(**inputs, **more, at_head=fused_logps(targets))
    assert abs(out.aux_loss - own.aux_loss) < 1e-5
    assert_same_gradients(gradients(model, out.value + out.aux_loss), want, 1e-4)
    model.config.output_router_logits = False
    assert model(**inputs, at_head=fused_logps(targets)).aux_loss is None


def vision_model(kind):
    """(a tiny vision-language model, a batch with two images)."""
    import transformers as t

    text = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(10, VOCAB, (2, 14))
    if kind == "llava":
        vision = dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            image_size=8, patch_size=4, projection_dim=16,
        )  # fmt: skip
        model = t.LlavaForConditionalGeneration(t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**vision), text_config=t.LlamaConfig(**text),
            image_token_index=5, vision_feature_layer=-1,
        ))  # fmt: skip
        ids[:, 1:5] = 5
        images = {"pixel_values": torch.randn(2, 3, 8, 8)}
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        model = t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(
            text_config=text | {"rope_parameters": rope},
            vision_config=dict(
                depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4,
            ),
            image_token_id=5, vision_start_token_id=6, vision_end_token_id=7,
        ))  # fmt: skip
        ids[:, 1], ids[:, 2:3], ids[:, 3] = 6, 5, 7
        grid = torch.tensor([[1, 2, 2]] * 2)
        images = {"pixel_values": torch.randn(8, 3 * 2 * 4 * 4), "image_grid_thw": grid}
        images["mm_token_type_ids"] = (ids == 5).int()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.3)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    return model.train(), {"input_ids": ids, "attention_mask": mask, **images}


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_images_of_vision_language_models(kind):
    model, inputs = vision_model(kind)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    targets = shifted(labels.masked_fill(labels < 8, -100))
    own = own_logps(model(**inputs, use_cache=False).logits, targets)
    want = gradients(model, own)
    at_head(model)
    got = model(**inputs, at_head=fused_logps(targets)).value
    assert (got - own).abs().max() < 2e-5
    assert_same_gradients(gradients(model, got), want, 1e-4)
    without = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")}
    assert not torch.allclose(model(**without, at_head=fused_logps(targets)).value, got)
    with pytest.raises(ValueError, match="reads more than text"):
        at_head(model, packed=True)


def test_padded_vocabulary():
    model = family_model("inkling_text", unpadded_vocab_size=VOCAB - 10)
    at_head(model)
    inputs, targets = batch()
    targets = targets.clamp(max=VOCAB - 11)
    own = model(**inputs, use_cache=False).logits
    assert own.shape[-1] == VOCAB - 10
    got = model(**inputs, at_head=fused_logps(targets)).value
    assert (got - own_logps(own, targets)).abs().max() < 2e-5


# ---- packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa", packed_attention.NAME])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "mistral"])
def test_packed_equals_padded(family, attention, left):
    model = family_model(family)
    if family == "gemma2" and attention != "eager":
        pytest.skip("soft-capped attention is eager's alone")
    if attention == packed_attention.NAME:
        model.set_attn_implementation("sdpa")
        assert packed_attention.use(model, 16)
    else:
        model.set_attn_implementation(attention)
    inputs, targets = batch(left=left)
    found = []
    for packed in (False, True):
        at_head(model, packed=packed)
        value = model(**inputs, at_head=fused_logps(targets)).value
        found.append((value, gradients(model, value)))
    (padded, want), (packed, got) = found
    assert (padded - packed).abs().max() < 1e-5
    assert_same_gradients(got, want, 1e-5)


@pytest.mark.parametrize("arguments", ["positional", "with position_ids", "no mask", "one row"])
def test_packing_reads_its_arguments_however_they_come(arguments):
    model = family_model("llama")
    inputs, targets = batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    given, named = (), dict(inputs)
    if arguments == "positional":
        given, named = (ids, mask), {}
    elif arguments == "with position_ids":
        named["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    elif arguments == "no mask":
        del named["attention_mask"]
    else:
        named, targets = {k: v[2:, :5] for k, v in inputs.items()}, targets[2:, :5]
    calls = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    at_head(model)
    padded = model(*given, **named, at_head=fused_logps(targets)).value
    at_head(model, packed=True)
    calls.clear()
    packed = model(*given, **named, at_head=fused_logps(targets)).value
    whole = arguments in ("no mask", "one row")
    assert calls == [named.get("input_ids", ids).shape if whole else (1, int(mask.sum()))]
    assert (padded - packed).abs().max() < 1e-5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama4_text", "gemma2"])
def test_hidden_states_after_every_block(family, packed):
    model = family_model(family)
    inputs, _ = batch()
    own = model(**inputs, output_hidden_states=True).hidden_states[1:]
    at_head(model, packed=packed)
    layers = model(**inputs, output_hidden_states=True, at_head=lambda view: view.layers).value
    assert layers.shape == (2, 3, 11, 32)
    keep = inputs["attention_mask"].bool()
    for mine, theirs in zip(layers, own, strict=True):
        assert (mine - theirs)[keep].abs().max() < 1e-5
    assert model(**inputs, at_head=lambda view: view.layers).value is None
