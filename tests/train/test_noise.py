"""Training mode without noise: policy and reference agree before the first step, for every family
that draws random numbers in forward, and the same with gradient checkpointing."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import config, write_data
from tiny_tokenizer import byte_tokenizer

from prefkern.train import pairing, train
from prefkern.train.run import prepare

V = 260
LLAMA = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
MOE = dict(num_local_experts=4, num_experts_per_tok=2)


def family(name: str):
    """A small model of the family with every rate of noise it knows switched on."""
    import transformers as t

    torch.manual_seed(0)
    makers = {
        # rates read from the config in forward
        "falcon": lambda: t.FalconForCausalLM(
            t.FalconConfig(
                vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                hidden_dropout=0.3, attention_dropout=0.3,
            )
        ),
        "persimmon": lambda: t.PersimmonForCausalLM(
            t.PersimmonConfig(**LLAMA | dict(hidden_dropout=0.3, attention_dropout=0.3))
        ),
        # whole layers left out
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=V, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=128, layerdrop=0.5, dropout=0.3,
                word_embed_proj_dim=32,
            )
        ),
        "biogpt": lambda: t.BioGptForCausalLM(
            t.BioGptConfig(**LLAMA | dict(layerdrop=0.5, hidden_dropout_prob=0.3))
        ),
        # noise on routers
        "mixtral": lambda: t.MixtralForCausalLM(
            t.MixtralConfig(**LLAMA | MOE | dict(router_jitter_noise=0.5))
        ),
        "phimoe": lambda: t.PhimoeForCausalLM(
            t.PhimoeConfig(**LLAMA | MOE | dict(router_jitter_noise=0.3, input_jitter_noise=0.3))
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(
                vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.3,
                embd_pdrop=0.3, attn_pdrop=0.3,
            )
        ),
    }  # fmt: skip
    return makers[name]()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "name", ["falcon", "persimmon", "opt", "biogpt", "mixtral", "phimoe", "gpt2"]
)
def test_the_first_loss_is_ln_2(tmp_path, name, checkpointing):
    model = family(name)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    data = write_data(tmp_path / "pairs.jsonl")
    options = dict(max_steps=1, packing="off", gradient_checkpointing=checkpointing)
    made = config(tmp_path / "out", str(tmp_path / "model"), data, **options)
    loss = train(made)["log_history"][0]["loss"]
    assert loss == pytest.approx(0.6931472, abs=2e-5)
    # the saved config keeps the rates of the model
    own, saved = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("model", "out"))
    rates = [k for k, v in own.items() if isinstance(v, float) and ("drop" in k or "jitter" in k)]
    assert rates and all(saved[k] == own[k] for k in rates)


def test_noise_of_an_unknown_kind_is_refused(tmp_path, monkeypatch):
    from tiny_models import save_model

    model, data = save_model(tmp_path / "model"), write_data(tmp_path / "pairs.jsonl")
    run = prepare(config(tmp_path / "out", model, data))
    policy = run.step.policy
    layer = policy.model.layers[0].mlp
    original = layer.forward
    # noise that asks the model, not the module, whether it trains
    monkeypatch.setattr(
        layer, "forward", lambda x: original(x) + policy.training * torch.randn_like(x)
    )
    with pytest.raises(ValueError, match="gives other log-probabilities in training mode"):
        pairing.check_noise(policy, run.examples, run.config)


def test_dropout_that_is_asked_for_stays(tmp_path):
    model = family("falcon")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    data = write_data(tmp_path / "pairs.jsonl")
    options = dict(max_steps=1, packing="off", disable_dropout=False)
    made = config(tmp_path / "out", str(tmp_path / "model"), data, **options)
    loss = train(made)["log_history"][0]["loss"]
    assert abs(loss - 0.6931472) > 1e-4


def test_gradient_checkpointing_still_recomputes(tmp_path):
    from tiny_models import save_model

    model, data = save_model(tmp_path / "model"), write_data(tmp_path / "pairs.jsonl")
    calls = {}
    for checkpointing in (False, True):
        made = config(
            tmp_path / str(checkpointing), model, data, max_steps=1,
            gradient_checkpointing=checkpointing, loss=("simpo",),
        )  # fmt: skip
        run, counted = prepare(made), []
        layer = run.step.policy.model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        run.step.train()
        micro = run.micro_batch(run.examples[:2])
        run.step(micro, *run.constants(micro), run.count_items(run.examples[:2]))[0].backward()
        calls[checkpointing] = len(counted)
    assert calls == {False: 1, True: 2}
