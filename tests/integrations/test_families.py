"""at_head gives what a model's own logits give: every causal family that can be made tiny."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, family_model
from head_batches import batch, compare, fused_logps, own_logps

from prefkern.integrations import hf
from prefkern.integrations.head import at_head

# Families whose attention does not read positions, or whose layers carry a state: packing them is
# refused. A family that is neither here nor equal to padded rows fails.
NOT_PACKED = [
    "afmoe", "axk2", "bailing_hybrid", "bamba", "bart", "bert", "bert-generation", "big_bird",
    "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small", "bloom", "camembert",
    "cpmant", "data2vec-text", "deepseek_v32", "deepseek_v4", "electra", "ernie", "falcon",
    "falcon_h1", "falcon_mamba", "glm_moe_dsa", "gpt_oss", "granitemoehybrid", "hy_v4",
    "inkling2_text", "inkling_text", "jamba", "kimi_linear", "lfm3", "mamba", "mamba2",
    "marian", "mbart", "megatron-bert", "minimax", "mpt", "mvp", "nemotron_h", "olmo_hybrid",
    "openai-gpt", "opt", "pegasus", "plbart", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
    "qwen4_exp_text", "recurrent_gemma", "rembert", "roberta", "roberta-prelayernorm",
    "roformer", "rwkv", "trocr", "whisper", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl",
    "xlnet", "xlstm",
]  # fmt: skip
# over a second for two forwards and backwards: recurrences as Python loops
SLOW = {
    "kimi_linear", "nemotron_h", "qwen4_exp_text", "qwen3_next", "qwen3_5_text", "afmoe",
    "qwen3_5_moe_text", "granitemoehybrid", "falcon_h1", "bamba",
}  # fmt: skip
EVERY = [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FAMILIES]


@pytest.fixture
def make():
    from transformers import CONFIG_MAPPING

    def build(family: str):
        if family not in CONFIG_MAPPING:
            pytest.skip(f"transformers has no {family}")
        return family_model(family)

    return build


@pytest.mark.parametrize("family", EVERY)
def test_log_probabilities_and_gradients(make, family):
    model = make(family)
    inputs, targets = batch()
    before = own_logps(model(**inputs, use_cache=False).logits, targets)
    at_head(model)
    compare(model)
    after = own_logps(model(**inputs, use_cache=False).logits, targets)
    assert torch.equal(before, after)  # without the keyword nothing changed


@pytest.mark.parametrize("family", EVERY)
def test_packed_rows_equal_padded_ones_or_are_refused(make, family):
    model = make(family)
    if family in NOT_PACKED:
        with pytest.raises(ValueError, match=r"packed=False|no causal model"):
            at_head(model, packed=True)
        return
    inputs, targets = batch()
    found = []
    for packed in (False, True):
        at_head(model, packed=packed)
        found.append(model(**inputs, at_head=fused_logps(targets)).value)
    assert (found[0] - found[1]).abs().max() < 1e-5


def test_the_list_of_families_names_treatments_of_logits():
    """The models above are told apart by what they do to logits, not by name alone."""
    seen = {family: hf.logit_options(family_model(family).config.get_text_config())
            for family in ("llama", "gemma2", "granite", "cohere", "hyperclovax", "mpt", "minicpm3",
                           "falcon_h1", "recurrent_gemma", "xlstm")}  # fmt: skip
    assert seen == {
        "llama": (1.0, None), "gemma2": (1.0, 3.0), "granite": (0.25, None),
        "cohere": (0.25, None), "hyperclovax": (0.5, None), "mpt": (1.0, None),
        "minicpm3": (1.0, None), "falcon_h1": (0.5, None), "recurrent_gemma": (1.0, 30.0),
        "xlstm": (1.0, 30.0),
    }  # fmt: skip
