"""Reading the head of transformers models: values per family, refusals by name, packing."""

from __future__ import annotations

import pytest
import torch
from tiny_models import STORIES, VOCAB, tiny_model
from torch import nn

from prefkern.integrations import hf, packed_attention
from prefkern.train.data import Encoded, Example, collate

FAMILIES = ("llama", "gemma2", "granite", "cohere", "hyperclovax", "minicpm3", "phi", "gpt2", "mpt")
# the constant that each family's own modelling file applies
OPTIONS = {
    "llama": (1.0, None),
    "gemma2": (1.0, 3.0),
    "granite": (0.25, None),
    "cohere": (0.25, None),
    "hyperclovax": (0.5, None),
    "minicpm3": (0.25, None),
    "phi": (1.0, None),
    "gpt2": (1.0, None),
    "mpt": (1.0, None),
}


def examples(lengths=(20, 33, 9, 47), seed=0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    draw = [
        torch.randint(VOCAB, (n,), generator=generator, dtype=torch.int32).numpy() for n in lengths
    ]
    return [Example(row=i, sequences=(Encoded(ids, len(ids) // 3),)) for i, ids in enumerate(draw)]


def check(model: nn.Module, **options) -> float:
    batch = collate(examples(), packed=False)
    return hf.check_head(
        model,
        batch.input_ids,
        batch.targets,
        position_ids=batch.position_ids,
        attention_mask=batch.attention_mask,
        **options,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_logps_are_those_of_the_models_own_logits(family):
    model = tiny_model(family)
    assert check(model) < 1e-5
    scale, softcap = hf.logit_options(hf.text_config(model))
    assert (scale, softcap) == OPTIONS[family]


def test_bias_is_read():
    assert hf.read_head(tiny_model("phi")).bias is not None
    assert hf.read_head(tiny_model("llama")).bias is None


def test_bfloat16_weights_get_the_slack_of_rounded_logits():
    assert check(tiny_model("llama").to(torch.bfloat16)) < 0.1


def test_a_family_that_does_something_else_to_its_logits_is_refused():
    model = tiny_model("llama")
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 1.01 * head(hidden)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*differ.*own logits"):
        check(model)


def test_unused_logit_scale_of_mpt_is_not_applied():
    assert check(tiny_model("mpt", logit_scale=0.1)) < 1e-5


def test_model_without_output_embedding():
    import transformers

    model = transformers.LlamaModel(tiny_model("llama").config)
    with pytest.raises(ValueError, match=r"LlamaModel has no output embedding"):
        hf.refuse_unsupported(model)


def test_encoder_decoder_and_router_losses_are_refused():
    import transformers

    small = dict(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="encoder-decoder"):
        hf.refuse_unsupported(
            transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
        )
    model = tiny_model("llama")
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        hf.refuse_unsupported(model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules": ["lm_head"]}, r"adapter on the output embedding 'lm_head'"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            r"modules_to_save.*'lm_head'",
        ),
    ],
)
def test_adapters_on_the_head_are_refused_by_name(options, match):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **options)
    )
    with pytest.raises(ValueError, match=match):
        hf.refuse_unsupported(model)


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model("llama"), settings)
    with pytest.raises(ValueError, match="prompt learning"):
        hf.refuse_unsupported(model)


def test_adapter_off_is_the_base_model():
    peft = pytest.importorskip("peft")
    base = tiny_model("llama")
    batch = collate(examples(), packed=False)
    arguments = dict(position_ids=batch.position_ids, attention_mask=batch.attention_mask)
    before = hf.fused_logps(base, batch.input_ids, batch.targets, **arguments)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False
    )
    model = peft.get_peft_model(base, settings).eval()
    hf.refuse_unsupported(model)
    assert check(model) < 1e-5
    with hf.adapter_off(model):
        assert torch.equal(
            hf.fused_logps(model, batch.input_ids, batch.targets, **arguments), before
        )
    assert not torch.equal(
        hf.fused_logps(model, batch.input_ids, batch.targets, **arguments), before
    )
    with pytest.raises(ValueError, match="reference=adapter"):
        hf.adapter_off(base)


def packed_and_alone(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    def logps(batch):
        out = hf.fused_logps(
            model,
            batch.input_ids,
            batch.targets,
            position_ids=batch.position_ids,
            attention_mask=None,
        )
        return out[batch.targets != -100]

    alone = torch.cat([logps(collate([e], packed=True)) for e in examples()])
    return logps(collate(examples(), packed=True)), alone


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "eager"),
        ("llama", "sdpa"),
        ("llama", packed_attention.NAME),
        ("gpt2", "eager"),
        ("gpt2", "sdpa"),
        ("gpt2", packed_attention.NAME),
        ("gemma2", "eager"),
    ],
)
def test_packed_equals_alone(family, attention):
    model = tiny_model(family)
    if attention == packed_attention.NAME:
        model.set_attn_implementation("sdpa")
        assert packed_attention.use(model, 64)
    else:
        model.set_attn_implementation(attention)
    packed, alone = packed_and_alone(model)
    assert (packed - alone).abs().max() < 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa", packed_attention.NAME])
@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the trained model stories260K")
def test_packed_equals_alone_for_trained_weights(attention):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STORIES).eval()
    if attention == packed_attention.NAME:
        packed_attention.use(model, 64)
    else:
        model.set_attn_implementation(attention)
    packed, alone = packed_and_alone(model)
    assert (packed - alone).abs().max() < 1e-5


def test_packed_attention_gives_the_gradients_of_sdpa():
    batch = collate(examples(), packed=True)
    grads = {}
    for name in ("sdpa", packed_attention.NAME):
        model = tiny_model("llama")
        model.set_attn_implementation("sdpa")
        if name != "sdpa":
            packed_attention.use(model, 64)
        hidden, _ = hf.hidden_states(
            model, batch.input_ids, position_ids=batch.position_ids, attention_mask=None
        )
        (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
        grads[name] = torch.cat([p.grad.flatten() for p in model.model.parameters()])
    assert (grads["sdpa"] - grads[packed_attention.NAME]).abs().max() < 1e-5 * grads[
        "sdpa"
    ].abs().max()


def test_packed_attention_leaves_padded_batches_and_other_models_alone():
    model = tiny_model("llama")
    batch = collate(examples(), packed=False)
    arguments = dict(position_ids=batch.position_ids, attention_mask=batch.attention_mask)
    model.set_attn_implementation("sdpa")
    before = hf.fused_logps(model, batch.input_ids, batch.targets, **arguments)
    assert packed_attention.use(model, 64)
    assert torch.equal(hf.fused_logps(model, batch.input_ids, batch.targets, **arguments), before)
    packed_attention.stop(model)
    assert model.config._attn_implementation == "sdpa"
    windowed = tiny_model("gemma2")
    assert not packed_attention.use(windowed, 64)  # eager, and windows shorter than the sequences


def test_a_model_without_position_ids_cannot_be_packed():
    assert hf.takes_position_ids(tiny_model("llama"))
    assert not hf.takes_position_ids(tiny_model("mpt"))
