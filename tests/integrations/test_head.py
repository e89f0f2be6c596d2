"""at_head: adapters, refusals, hooks and training machinery, against full logits."""

from __future__ import annotations

import inspect

import pytest
import torch
from families import VOCAB, family_model
from head_batches import (
    assert_same_gradients,
    batch,
    compare,
    fused_logps,
    gradients,
    own_logps,
)
from torch import nn

from prefkern.integrations.head import at_head
from prefkern.integrations.verify import verify_head

peft = pytest.importorskip("peft")


def with_adapter(model, *, drop: float = 0.0, **options):
    """A LoRA model whose adapters do something, in training mode."""
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, lora_dropout=drop, init_lora_weights=False,
        **{"target_modules": ["q_proj", "lm_head"]} | options,
    )  # fmt: skip
    torch.manual_seed(3)
    return peft.get_peft_model(model, settings).train()


# ---- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [0.0, 0.4])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi"])
def test_lora_on_the_head(family, drop):
    model = with_adapter(family_model(family), drop=drop)
    at_head(model)
    compare(model)


def test_several_active_adapters_of_different_ranks():
    model = with_adapter(family_model("llama"), drop=0.3)
    model.add_adapter("second", peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=9, lora_dropout=0.2, init_lora_weights=False,
        use_rslora=True, target_modules=["v_proj", "lm_head"],
    ))  # fmt: skip
    model.base_model.set_adapter(["default", "second"])
    at_head(model)
    compare(model)
    model.set_adapter("second")
    compare(model)


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("tying", [False, True])
def test_lora_on_a_tied_head(targets, tying):
    base = family_model("llama", tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = with_adapter(base, target_modules=targets, ensure_weight_tying=tying)
    at_head(model)
    compare(model)


@pytest.mark.parametrize("tied", [False, True])
def test_modules_to_save(tied):
    base = family_model("llama", tie_word_embeddings=tied)
    model = with_adapter(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.3)
    at_head(model)
    compare(model)
    with model.disable_adapter():
        inputs, targets = batch()
        own = own_logps(model(**inputs).logits, targets)
        got = model(**inputs, at_head=fused_logps(targets)).value
        assert (got - own).abs().max() < 2e-5


@pytest.mark.parametrize("state", ["merged", "disabled", "merged and disabled", "other adapter"])
def test_merged_and_disabled_adapters_are_read_right(state):
    model = with_adapter(family_model("llama")).eval()
    at_head(model)
    inputs, targets = batch()
    if "merged" in state:
        model.merge_adapter()
    if state == "other adapter":  # active, and not on the head
        model.add_adapter("other", peft.LoraConfig(
            task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj"],
        ))  # fmt: skip
        model.set_adapter("other")
    if "disabled" in state:
        model.base_model.disable_adapter_layers()
    got = model(**inputs, at_head=fused_logps(targets)).value
    own = own_logps(model(**inputs).logits, targets)
    assert (got - own).abs().max() < 2e-5


def test_an_adapter_that_comes_after_at_head():
    model = family_model("llama")
    at_head(model)
    compare(with_adapter(model, drop=0.2))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "LoRA bias"),
        ({"trainable_token_indices": {"lm_head": [1, 2]}}, "TrainableTokens"),
        (
            {"target_parameters": ["lm_head.weight"], "target_modules": ["q_proj"]},
            "targets parameters of the head 'lm_head'",
        ),
    ],
)  # fmt: skip
def test_other_lora_on_the_head_is_refused_by_name(options, match):
    if "trainable_token_indices" in options:
        options["target_modules"] = ["q_proj"]
    model = with_adapter(family_model("llama"), **options)
    with pytest.raises(ValueError, match=match):
        at_head(model)


@pytest.mark.parametrize("kind", ["IA3", "LoHa", "VeRA", "OFT"])
def test_other_tuners_on_the_head_are_refused_by_name(kind):
    own = {"IA3": {"feedforward_modules": []}, "OFT": {"oft_block_size": 4, "r": 0}}
    config = getattr(peft, f"{kind}Config" if kind != "VeRA" else "VeraConfig")
    model = peft.get_peft_model(
        family_model("llama"),
        config(task_type="CAUSAL_LM", target_modules=["lm_head"], **own.get(kind, {})),
    )
    with pytest.raises(ValueError, match=f"(?i)peft.tuners.{kind}.* on the output embedding"):
        at_head(model)


def test_an_adapter_for_every_row_is_refused():
    model = with_adapter(family_model("llama")).eval()
    at_head(model)
    inputs, targets = batch()
    with pytest.raises(ValueError, match="adapter_names"):
        model(**inputs, adapter_names=["default"] * 3, at_head=fused_logps(targets))


# ---- heads that are refused ----------------------------------------------------------------------


class Int8Linear(nn.Linear):
    """A quantised head as libraries make them: integers and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter(
            (linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False
        )
        self.scale = scale

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Int8Linear, r"float weight \[V, D\], got torch.int8"),
        (lambda h: h.to(torch.float8_e4m3fn), "float8"),
        (lambda h: ScaledLinear(h.in_features, h.out_features), "ScaledLinear.*own way"),
        (lambda h: nn.Sequential(h), "Sequential"),
    ],
)
def test_heads_that_are_no_plain_linear_map_are_refused(make, match):
    model = family_model("llama")
    at_head(model)  # the head may change afterwards
    model.lm_head = make(model.lm_head)
    inputs, targets = batch()
    with pytest.raises(ValueError, match=match):
        at_head(model)
    with pytest.raises(ValueError, match=match):
        model(**inputs, at_head=fused_logps(targets))


@pytest.mark.parametrize("name", ["Linear8bitLt", "Linear4bit"])
def test_quantised_heads_of_bitsandbytes_are_refused(name):
    bnb = pytest.importorskip("bitsandbytes")
    model = family_model("llama")
    model.lm_head = getattr(bnb.nn, name)(32, VOCAB, bias=False)
    with pytest.raises(ValueError, match=r"lm_head.*quantis"):
        at_head(model)


def test_models_without_a_causal_head_are_refused():
    import transformers

    small = dict(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="encoder-decoder"):
        at_head(transformers.T5ForConditionalGeneration(transformers.T5Config(**small)))
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        at_head(family_model("llama").model)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="prompt learning"):
        at_head(peft.get_peft_model(family_model("llama"), prompts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verification_leaves_the_model_as_it_was(dtype):
    model = with_adapter(family_model("llama").to(dtype), drop=0.5)
    model.base_model.model.model.layers[0].eval()
    at_head(model)
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    assert verify_head(model) < 0.1
    assert torch.equal(torch.rand(3), want)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(p.grad is None for p in model.parameters())


def test_labels_belong_to_the_computation():
    model = family_model("llama")
    at_head(model)
    inputs, targets = batch()
    with pytest.raises(ValueError, match="labels and at_head"):
        model(**inputs, labels=inputs["input_ids"], at_head=fused_logps(targets))


# ---- training machinery --------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradient_checkpointing(reentrant, packed):
    model = with_adapter(family_model("llama"), target_modules=["q_proj", "lm_head"])
    at_head(model, packed=packed)
    inputs, targets = batch()
    want = gradients(model, model(**inputs, at_head=fused_logps(targets)).value)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model, model(**inputs, at_head=fused_logps(targets)).value)
    assert_same_gradients(got, want, 1e-6)


@pytest.mark.parametrize("adapter", [False, True])
def test_autocast(adapter):
    """Against full logits in the same autocast: a rounded logit is 2^-8 of its size off."""
    model = family_model("llama")
    if adapter:
        model = with_adapter(model)
    at_head(model)
    inputs, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
        own = own_logps(logits, targets)
        got = model(**inputs, at_head=fused_logps(targets)).value
    assert logits.dtype == torch.bfloat16 and got.dtype == torch.float32
    assert (got - own).abs().max() < 2**-7 * logits.abs().max()
    assert_same_gradients(gradients(model, got), gradients(model, own.clone()), 0.05)


@pytest.mark.parametrize("what", ["backbone", "blocks", "model"])
def test_compiled_models(what):
    torch._dynamo.reset()
    model = family_model("llama")
    inputs, targets = batch()
    at_head(model)
    want = gradients(model, model(**inputs, at_head=fused_logps(targets)).value)
    called = model
    if what == "backbone":
        model.model.compile(backend="aot_eager")
    elif what == "blocks":
        for block in model.model.layers:
            block.compile(backend="aot_eager")
    else:
        called = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        got = gradients(model, called(**inputs, at_head=fused_logps(targets)).value)
        assert_same_gradients(got, want, 1e-5)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    torch._dynamo.reset()


def test_hooks_on_the_head_run_and_see_the_result():
    model = with_adapter(family_model("llama"))
    at_head(model)
    inputs, targets = batch()
    seen = []
    head = model.get_output_embeddings()
    for module in (head, head.base_layer, head.lora_B["default"]):
        module.register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__))
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(**inputs, at_head=fused_logps(targets))
    assert seen == ["Linear", "Linear", "Linear", targets.shape]


def test_the_signature_stays_and_generation_works():
    model = family_model("llama")
    before = inspect.signature(model.forward)
    inputs, _ = batch()
    want = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    at_head(model)
    at_head(model)
    assert inspect.signature(model.forward) == before
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), want)


@pytest.fixture
def accelerate():
    """Without the settings that other tests of this process left, and leaving none."""
    module = pytest.importorskip("accelerate")
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_under_the_wrappers_of_accelerate(accelerate):
    """Its autocast stands before ours and can be taken off; device_map's hooks on the head run."""
    model = family_model("llama")
    at_head(model)
    inputs, targets = batch()
    want = model(**inputs, at_head=fused_logps(targets)).value
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    got = prepared(**inputs, at_head=fused_logps(targets)).value
    assert got.dtype == torch.float32 and 1e-6 < (got - want).abs().max() < 0.2
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(plain(**inputs, at_head=fused_logps(targets)).value, want)
    accelerate.cpu_offload(plain, execution_device=torch.device("cpu"))
    assert plain.lm_head.weight.is_meta
    with torch.no_grad():
        assert torch.equal(plain(**inputs, at_head=fused_logps(targets)).value, want)
    assert plain.lm_head.weight.is_meta
