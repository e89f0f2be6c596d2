"""Reading the head of transformers models: values per family, refusals by name, packing."""

from __future__ import annotations

import pytest
import torch
from tiny_models import STORIES, VOCAB, config, tiny_model
from torch import nn

from prefkern.integrations import hf, packed_attention
from prefkern.integrations.head import at_head
from prefkern.integrations.output_layer import output_layer_of
from prefkern.integrations.verify import verify_head
from prefkern.train import pairing
from prefkern.train.data import Encoded, Example, collate
from prefkern.train.forward import inputs_of, target_logps

FAMILIES = ("llama", "gemma2", "granite", "cohere", "hyperclovax", "minicpm3", "phi", "gpt2", "mpt")
# what each family's own modelling file applies to what its head returns
OPTIONS = {
    "llama": (1.0, None),
    "gemma2": (1.0, 3.0),
    "granite": (0.25, None),
    "cohere": (0.25, None),
    "hyperclovax": (0.5, None),
    "minicpm3": (1.0, None),
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


def check(model: nn.Module) -> float:
    at_head(model)
    return verify_head(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_at_the_head_are_those_of_the_models_own_logits(family):
    model = tiny_model(family)
    assert check(model) < 1e-5
    assert hf.logit_options(hf.text_config(model)) == OPTIONS[family]


def test_what_is_said_of_the_head():
    phi, llama = (output_layer_of(tiny_model(name)) for name in ("phi", "llama"))
    assert phi.parameters[1] is not None and llama.parameters[1] is None
    assert phi.vocabulary == llama.vocabulary == VOCAB
    assert output_layer_of(tiny_model("cohere")).options == {"scale": 0.25, "softcap": None}


def test_unused_logit_scale_of_mpt_is_not_applied():
    assert check(tiny_model("mpt", logit_scale=0.1)) < 1e-5


def test_model_without_output_embedding():
    import transformers

    model = transformers.LlamaModel(tiny_model("llama").config)
    with pytest.raises(ValueError, match=r"LlamaModel has no output embedding"):
        hf.refuse_unsupported(model)


def test_encoder_decoder_models_are_refused():
    import transformers

    small = dict(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="encoder-decoder"):
        hf.refuse_unsupported(
            transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
        )


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model("llama"), settings)
    with pytest.raises(ValueError, match="prompt learning"):
        hf.refuse_unsupported(model)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_adapter_off_is_the_base_model(targets):
    peft = pytest.importorskip("peft")
    base = tiny_model("llama")
    at_head(base)
    batch = collate(examples(), packed=False)
    before = target_logps(base, batch)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False
    )
    model = peft.get_peft_model(base, settings).eval()
    assert check(model) < 1e-5
    with hf.adapter_off(model):
        assert torch.equal(target_logps(model, batch), before)
    assert not torch.equal(target_logps(model, batch), before)
    with pytest.raises(ValueError, match="reference=adapter"):
        hf.adapter_off(base)


def packed_and_alone(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    at_head(model)

    def logps(batch):
        return target_logps(model, batch)[batch.targets != -100]

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
        at_head(model)
        with inputs_of(model, batch) as inputs:
            hidden = model(**inputs, at_head=lambda view: view.hidden).value
        (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
        grads[name] = torch.cat([p.grad.flatten() for p in model.model.parameters()])
    assert (grads["sdpa"] - grads[packed_attention.NAME]).abs().max() < 1e-5 * grads[
        "sdpa"
    ].abs().max()


def test_packed_attention_leaves_padded_batches_and_other_models_alone():
    model = tiny_model("llama")
    batch = collate(examples(), packed=False)
    at_head(model)
    model.set_attn_implementation("sdpa")
    before = target_logps(model, batch)
    assert packed_attention.use(model, 64)
    assert torch.equal(target_logps(model, batch), before)
    packed_attention.stop(model)
    assert model.config._attn_implementation == "sdpa"
    windowed = tiny_model("gemma2")
    assert not packed_attention.use(windowed, 64)  # eager, and windows shorter than the sequences


def test_a_model_without_position_ids_cannot_be_packed():
    assert hf.takes_position_ids(tiny_model("llama"))
    assert not hf.takes_position_ids(tiny_model("mpt"))


def test_a_model_that_reads_packed_rows_as_others_is_not_packed():
    """A compiled or wrapped model may number positions by itself: packed and alone are compared."""
    rows = [Example(i, (Encoded(torch.arange(4 + i).numpy().astype("int32"), 2),)) for i in (0, 1)]
    said: list[str] = []

    def shifted(compute):
        found = compute()
        return found + 0.5 if found.numel() > 5 else found

    model = tiny_model()
    at_head(model)
    settings = config("out", "m", "d", packing="auto")
    assert pairing.choose_packing(said.append, model, rows, settings) and not said
    assert not pairing.choose_packing(said.append, model, rows, settings, shifted)
    assert "packed log-probabilities differ by 0.5 nats from each sequence alone" in said[0]
    with pytest.raises(ValueError, match="batches cannot be packed: packed log-prob"):
        on = config("out", "m", "d", packing="on")
        pairing.choose_packing(said.append, model, rows, on, shifted)
