"""Tiny random models of every causal family of transformers that small sizes suffice for."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tiny_models import with_large_logits

VOCAB = 260
# Sizes under all the names that configurations use; a family takes those it knows.
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, head_dim=8,
    n_embd=32, n_layer=2, n_head=4, n_positions=128, d_model=32, n_layers=2, n_heads=4,
    max_seq_len=128, num_experts=4, num_local_experts=4, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    ffn_dim=48, word_embed_proj_dim=32, num_layers=2, ffn_hidden_size=48, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, n_shared_experts=1, n_group=1, topk_group=1,
    first_k_dense_replace=1, sliding_window=16, rotary_dim=4, state_size=8, mamba_d_state=8,
    mamba_n_heads=8, mamba_d_head=8, mamba_expand=2, mamba_n_groups=1, decoder_layers=2,
    decoder_attention_heads=4, decoder_ffn_dim=48, is_decoder=True,
)  # fmt: skip
_LATENT = dict(num_key_value_heads=4)  # attention through a latent has as many key as query heads
# What single families want otherwise, and treatments of logits their default leaves out.
_OWN: dict[str, dict[str, Any]] = {
    "axk1": _LATENT, "axk2": _LATENT, "deepseek_v2": _LATENT, "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT, "glm4_moe_lite": _LATENT, "glm_moe_dsa": _LATENT, "youtu": _LATENT,
    "minicpm3": _LATENT | dict(dim_model_base=8),
    "gemma2": dict(final_logit_softcapping=3.0),
    "granite": dict(logits_scaling=4.0),
    "granitemoe": dict(logits_scaling=4.0),
    "cohere": dict(logit_scale=0.25),
    "cohere2": dict(logit_scale=0.25),
    "hyperclovax": dict(logits_scaling=0.5),
    "mpt": dict(logit_scale=0.1),  # in the config and never applied
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], hidden_size=32, num_heads=4),
    "falcon_h1": dict(mamba_d_ssm=64, lm_head_multiplier=0.5),
    "mamba2": dict(num_heads=8, head_dim=8, expand=2, n_groups=1),
    "modernbert-decoder": dict(global_attn_every_n_layers=1),
}  # fmt: skip

FAMILIES = [
    "afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bailing_hybrid", "bamba", "bart",
    "beam", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "bitnet",
    "blenderbot", "blenderbot-small", "bloom", "camembert", "codegen", "cohere", "cohere2",
    "cohere2_moe", "cpmant", "ctrl", "cwm", "data2vec-text", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "diffllama", "doge", "dots1", "electra", "ernie", "ernie4_5",
    "ernie4_5_moe", "exaone4", "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo",
    "flint", "gemma", "gemma2", "gemma3_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granite_swa", "granitemoe",
    "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "inkling2_text",
    "inkling_text", "internlm3", "jais2", "jamba", "jetmoe", "kimi_linear", "kolibri1",
    "laguna", "lfm2", "lfm3", "llama", "llama4_text", "mamba", "mamba2", "marian", "mbart",
    "megatron-bert", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "modernbert-decoder",
    "moshi", "mpt", "mvp", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3",
    "olmo_hybrid", "olmoe", "openai-gpt", "opt", "pegasus", "persimmon", "phi", "phi3",
    "phimoe", "plbart", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_moe", "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "rembert", "roberta",
    "roberta-prelayernorm", "roformer", "rwkv", "seed_oss", "smollm3", "solar_open", "stablelm",
    "starcoder2", "trocr", "vaultgemma", "whisper", "xglm", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "xlstm", "youtu",
]  # fmt: skip


def family_model(family: str, seed: int = 0, **options: Any) -> Any:
    """A model of `family` with random weights and logits large enough to tell right from wrong."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config_class = CONFIG_MAPPING[family]
    known = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    sizes = {k: v for k, v in _SIZES.items() if k in known or k in ("vocab_size", "hidden_size")}
    config = config_class(**{**sizes, **_OWN.get(family, {}), **options})
    torch.manual_seed(seed)
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])(config)
    return with_large_logits(model)
