"""What cannot be honoured is refused before the first step, with the reason."""

from __future__ import annotations

import pytest

trl = pytest.importorskip("trl")

import peft  # noqa: E402
import torch  # noqa: E402
import trl_runs as runs  # noqa: E402

from prefkern.integrations import trl as ours  # noqa: E402
from prefkern.integrations.trl import versions  # noqa: E402


def make(folder, loss, *, dataset=None, reference=True, lora=None, policy=None, **options):
    given = dict(options.pop("given", {}))
    policy = runs.model() if policy is None else policy
    if lora is not None:
        given["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", **lora)
    elif reference:
        given["ref_model"] = runs.perturbed(policy)
    return ours.DPOTrainer(
        model=policy,
        args=ours.DPOConfig(**runs.settings(folder, loss_type=loss, **options)),
        train_dataset=runs.pairs(6) if dataset is None else dataset,
        processing_class=runs.tokenizer(),
        **given,
    )


def small(vocabulary):
    """A model of another vocabulary."""
    import transformers as t

    return t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    )


def listed(**cells):
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": "a", "completions": ["x", "y"], "scores": [1.0, 2.0]} | cells]
    )


REFUSED = {
    "no name": (dict(loss=[]), "must be the name of a loss or a list of names, got ..;"),
    "no string": (dict(loss=3), "must be the name of a loss or a list of names, got 3;"),
    "capitals": (dict(loss="DPO"), "unknown loss 'DPO'; nearest: dpo,"),
    "arguments in a list": (dict(loss="dpo", loss_args=["beta"]), "loss_args must be a mapping"),
    "columns in a string": (dict(loss="dpo", loss_columns="w"), "loss_columns must be a mapping"),
    "a column's name": (dict(loss="dpo", loss_columns={"item_weights": 3}), "names of columns"),
    "an argument twice": (dict(loss="dpo:beta=0.5, beta=0.6"), "beta stands there twice"),
    "weights": (dict(loss="dpo", loss_weights=[float("nan")]), "loss_weights must be finite"),
    "weighting of hinge": (
        dict(loss=["sigmoid", "hinge"], use_weighting=True), "TRL's hinge does not bear",
    ),
    "alpha of TRL's divergence": (dict(loss="fdpo", f_alpha_divergence_coef=0.3), "fdpo"),
    "memory budget": (dict(loss="dpo", given={"memory_budget": -1}), "memory_budget must be"),
    "small reference": (
        dict(loss="sigmoid", given={"ref_model": small(100)}, reference=False),
        "ref_model knows 100 tokens, the tokenizer 258 and the policy 264",
    ),
    "other head": (
        dict(loss="tdpo2", given={"ref_model": small(260)}, reference=False),
        "tdpo2.* compares the policy's distribution over 264 tokens with ref_model's over 260",
    ),
    "small third model": (dict(loss="tgdpo", given={"aux_model": small(100)}), "aux_model knows"),
    "empty": (dict(loss="tdpo2", dataset=runs.pairs(1).select([])), "train_dataset is empty"),
    "text in a column": (
        dict(loss="soft_label", dataset=runs.pairs(4, pref_prob=lambda i: "no")),
        "column 'pref_prob' must hold a number or a list of numbers in every row, got 'no'",
    ),
    "weights in lists": (
        dict(loss="dpo", loss_columns={"item_weights": "w"},
             dataset=runs.pairs(4, w=lambda i: [1.0, 2.0])),
        "column 'w' must hold a number in every row",
    ),
    "one answer": (
        dict(loss="lipo", dataset=listed(completions=["x"], scores=[1.0])), "two answers or more",
    ),
    "answers in a string": (dict(loss="lipo", dataset=listed(completions="xy")), "two answers or"),
    "fewer scores": (dict(loss="lipo", dataset=listed(scores=[1.0])), "for each of the 2 compl"),
    "scores in words": (dict(loss="lipo", dataset=listed(scores=["good", "bad"])), "finite number"),
    "unknown loss": (dict(loss="tdpo3"), "unknown loss 'tdpo3'; nearest: .*tdpo2"),
    "unknown argument": (
        dict(loss="tdpo2", loss_args={"alfa": 1.0}), "no argument 'alfa'; nearest: alpha",
    ),
    "out of range": (dict(loss="tdpo2", loss_args={"beta": -1.0}), "beta must be a finite number"),
    "out of range behind the name": (dict(loss="simpo:gamma_beta_ratio=nan"), "finite number"),
    "f-divergence": (dict(loss="tdpo2", f_divergence_type="js_divergence"), "fdpo"),
    "weighting": (dict(loss="tdpo2", use_weighting=True), "wpo"),
    "ld_alpha": (dict(loss="tdpo2", ld_alpha=0.5), "ld_dpo"),
    "label smoothing": (dict(loss="tdpo2", label_smoothing=0.1), "no loss of .* has it"),
    "precomputed distribution": (
        dict(loss="tdpo2", precompute_ref_log_probs=True), "the reference's whole distribution",
    ),
    "precomputed lists": (
        dict(loss="lipo", precompute_ref_log_probs=True, dataset=runs.lists(4)),
        "more answers than two",
    ),
    "third model missing": (dict(loss="tgdpo"), "third, frozen model; pass aux_model"),
    "third model unread": (
        dict(loss="tdpo2", given={"aux_model": object()}), "reads no third model; drop it",
    ),
    "third model, TRL's loss": (
        dict(loss="sigmoid", given={"aux_model": object()}), "losses that read a third model",
    ),
    "reference unread": (dict(loss="simpo"), "reads no reference; drop ref_model"),
    "pairs for lists": (dict(loss="lipo"), "completions, scores.*no completions, scores"),
    "lists for pairs": (dict(loss="tdpo2", dataset=runs.lists(4)), "trains on pairs"),
    "answers for pairs": (dict(loss="sigmoid", dataset=runs.answers(4)), "trains on pairs"),
    "no column": (dict(loss="soft_label"), "add a column 'pref_prob'"),
    "column of nothing": (dict(loss="dpo", loss_columns={"gap": "w"}), "no argument 'gap'"),
    "two kinds of data": (
        dict(loss=["lipo", "tdpo2"], dataset=runs.lists(4)), "read different data",
    ),
    "diffusion": (dict(loss="diffusion_dpo"), "diffusion"),
    "arguments not read": (dict(loss="tdpo2:0.5"), "name:key=value"),
    "padding_free, prompt learning": (
        dict(
            loss="sigmoid", reference=False, padding_free=True,
            given={
                "peft_config": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
            },
        ),
        "padding_free=True: prompt learning puts virtual tokens",
    ),
    "DoRA": (
        dict(loss="tdpo2", lora=dict(target_modules=["lm_head"], use_dora=True)), "DoRA|dora",
    ),
    "DoRA, TRL's loss": (
        dict(loss="sigmoid", lora=dict(target_modules=["lm_head"], use_dora=True)), "DoRA|dora",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_step(tmp_path, name):
    options, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        make(tmp_path, **options)


@pytest.mark.parametrize("name", ["cp", "sp"])
def test_split_sequences_are_refused(tmp_path, name):
    """As accelerate sets them: on the accelerator, not in the configuration."""
    made = make(tmp_path, "tdpo2")
    made.accelerator.state.parallelism_config = type("Config", (), {f"{name}_enabled": True})()
    with pytest.raises(ValueError, match=f"whole sequences on every rank.*{name}_size > 1"):
        made._refuse_split_sequences()


def test_a_model_by_name_and_lists_for_kto_are_refused(tmp_path):
    for name in ("ref_model", "aux_model"):
        with pytest.raises(TypeError, match=f"{name} must be a model, got 'here'"):
            make(
                tmp_path,
                "tgdpo",
                given={"aux_model": runs.model()} | {name: "here"},
                reference=False,
            )
    with pytest.raises(ValueError, match="single answers, columns prompt, completion and label"):
        ours.KTOTrainer(
            model=runs.model(), args=ours.KTOConfig(**runs.settings(tmp_path)),
            train_dataset=runs.lists(4), processing_class=runs.tokenizer(),
        )  # fmt: skip


def test_a_cell_without_its_number_is_named(tmp_path):
    rows = runs.pairs(4, pref_prob=lambda i: None if i == 2 else 0.5)
    made = make(tmp_path, "soft_label", dataset=rows)
    with pytest.raises(ValueError, match="column 'pref_prob' must hold a number in every row"):
        made.data_collator([made.train_dataset[i] for i in range(4)])


def test_a_family_that_changes_its_logits_is_refused(tmp_path):
    """Log-probabilities at the head that are not those of the model's own logits."""

    class Shifted(type(runs.model())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + torch.arange(out.logits.shape[-1])
            return out

    policy = runs.model()
    policy.__class__ = Shifted
    for loss in ("sigmoid", "tdpo2"):
        with pytest.raises(ValueError, match="logits"):
            make(tmp_path, loss, policy=policy, reference=False, lora=dict(r=2))


def test_padding_free_is_refused_where_a_family_mixes_packed_rows(tmp_path):
    import transformers as t

    torch.manual_seed(0)
    config = t.OPTConfig(
        vocab_size=264, hidden_size=32, num_hidden_layers=1, ffn_dim=32, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3,
        attn_implementation="eager",
    )  # fmt: skip
    with pytest.raises(ValueError, match="padding_free=True: "):
        make(tmp_path, "tdpo2", policy=t.OPTForCausalLM(config), padding_free=True)


@pytest.mark.parametrize(
    ("version", "reason"),
    [("1.14.2", "no fused head before 1.15"), ("0.24.0", "no fused head"), ("1.17.0", "newer"),
     ("2.0.0", "newer"), ("1.16.0.dev0", "knows TRL 1.15 and 1.16")],
)  # fmt: skip
def test_other_versions_are_refused_with_the_reason(version, reason):
    with pytest.raises(ImportError, match=reason):
        versions.check_version(version)


@pytest.mark.parametrize("version", ["1.15.0", "1.15.3", "1.16.0", "1.16.1"])
def test_known_versions_pass(version):
    versions.check_version(version)


def test_a_changed_function_of_trl_is_refused(monkeypatch):
    import trl.trainer.utils as utils

    monkeypatch.setattr(utils, "add_fused_lm_head", lambda model, outputs: None)
    with pytest.raises(ImportError, match=r"add_fused_lm_head takes .'model', 'outputs'."):
        versions.check_signatures()


def test_names_of_trl_are_as_they_were_after_a_constructor_that_fails(tmp_path):
    import trl.trainer.dpo_trainer as module

    before = dict(vars(module))
    with pytest.raises(ValueError, match="unknown loss"):
        make(tmp_path, "tdpo3")
    with pytest.raises(ValueError):
        make(tmp_path, "sigmoid", lora=dict(target_modules=["lm_head"], use_dora=True))
    make(tmp_path, "tdpo2")
    assert {k: v for k, v in vars(module).items() if before.get(k) is not v} == {}


def test_a_trainer_without_a_fused_head_is_refused(tmp_path):
    from transformers import Trainer

    class Wrong(ours.FusedHead, Trainer):
        pass

    with pytest.raises(TypeError, match="must extend a trainer of TRL"):
        Wrong(model=runs.model())
