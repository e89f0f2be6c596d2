"""KTO, SFT, GRPO and RLOO: steps equal TRL's own; an adapter on the head, where TRL has none."""

from __future__ import annotations

import copy

import pytest

trl = pytest.importorskip("trl")

import peft  # noqa: E402
import torch  # noqa: E402
import trl_runs as runs  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from prefkern.integrations import trl as ours  # noqa: E402

_LORA = dict(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM")
ATTENTION = dict(target_modules=["q_proj", "v_proj"], **_LORA)
HEAD = dict(target_modules=["q_proj", "lm_head"], **_LORA)


def train(trainer, config, folder, dataset, *, family="llama", lora=None, steps=6, **options):
    given = dict(options.pop("given", {}))
    policy = runs.model(family)
    reference = options.pop("reference", False)
    if lora is not None:
        given["peft_config"] = peft.LoraConfig(**lora)
    elif reference:
        given["ref_model"] = runs.perturbed(policy)
    made = trainer(
        model=policy,
        args=config(**runs.settings(folder, **{"max_steps": steps} | options)),
        train_dataset=dataset,
        processing_class=runs.tokenizer(),
        **given,
    )
    made.train()
    return made


# ---- KTO -----------------------------------------------------------------------------------------

KTO = {
    "kto": {},
    "weights": {"desirable_weight": 1.5, "undesirable_weight": 0.5},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    "precomputed": {"precompute_ref_log_probs": True},
    "lora": {"lora": ATTENTION},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 3},
}


@pytest.mark.parametrize("name", KTO)
def test_kto(tmp_path, name):
    options = {"reference": True} | KTO[name]
    if name == "evaluation":
        options["given"] = {"eval_dataset": runs.answers(8)}
    want = train(trl.KTOTrainer, trl.KTOConfig, tmp_path, runs.answers(), **options)
    got = train(ours.KTOTrainer, ours.KTOConfig, tmp_path, runs.answers(), **options)
    runs.assert_same_runs(got, want)


def test_losses_of_single_answers(tmp_path):
    """apo_zero_unpaired by prefkern's formula equals TRL's; a loss that TRL lacks trains."""
    options = {"reference": True, "loss_type": "apo_zero_unpaired"}
    want = train(trl.KTOTrainer, trl.KTOConfig, tmp_path, runs.answers(), **options)
    got = train(
        ours.KTOTrainer, ours.KTOConfig, tmp_path, runs.answers(), **options,
        loss_args={"beta": 0.1},
    )  # fmt: skip
    assert got.plan is not None and want.state.global_step == 6
    theirs, mine = runs.history(want), runs.history(got)
    for a, b in zip(mine[:-1], theirs[:-1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-4)


def test_a_loss_of_pairs_is_refused_by_the_kto_trainer(tmp_path):
    with pytest.raises(ValueError, match=r"tdpo2.*pairwise.*this trainer has data for pointwise"):
        train(
            ours.KTOTrainer, ours.KTOConfig, tmp_path, runs.answers(), reference=True,
            loss_type="tdpo2",
        )  # fmt: skip


# ---- SFT -----------------------------------------------------------------------------------------


def texts(rows: int = 24):
    made = runs.answers(rows)
    return Dataset.from_list([{"prompt": r["prompt"], "completion": r["completion"]} for r in made])


SFT = {
    "nll": {},
    "all tokens": {"completion_only_loss": False},
    "dft": {"loss_type": "dft"},
    "packing": {"packing": True, "packing_strategy": "wrapped", "max_length": 32},
    "lora": {"lora": ATTENTION},
    "soft cap": {"family": "gemma2"},
    "router loss": {"family": "mixtral"},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("name", SFT)
def test_sft(tmp_path, name):
    options = SFT[name]
    want = train(trl.SFTTrainer, trl.SFTConfig, tmp_path, texts(), **options)
    got = train(ours.SFTTrainer, ours.SFTConfig, tmp_path, texts(), **options)
    runs.assert_same_runs(got, want)


class FullLogitsSFT(ours.SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        plain = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        logits, labels = model(**plain).logits[:, :-1], inputs["labels"][:, 1:]
        total = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )
        return total / (labels != -100).sum()


def test_sft_with_an_adapter_on_the_head(tmp_path):
    """TRL refuses it; here it equals the run on full logits, whose model applies the adapter."""
    with pytest.raises(ValueError):
        train(trl.SFTTrainer, trl.SFTConfig, tmp_path, texts(), lora=HEAD)
    want = train(FullLogitsSFT, ours.SFTConfig, tmp_path, texts(), lora=HEAD)
    got = train(ours.SFTTrainer, ours.SFTConfig, tmp_path, texts(), lora=HEAD)
    for a, b in zip(runs.history(got)[:-1], runs.history(want)[:-1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-4)
    for (name, p), q in zip(got.model.named_parameters(), want.model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=2e-4), name


# ---- GRPO, RLOO ----------------------------------------------------------------------------------


def vowels(completions, **_):
    return [sum(c in "aeiou" for c in text) + 0.01 * len(text) for text in completions]


def prompts(rows: int = 12):
    return Dataset.from_list([{"prompt": r["prompt"]} for r in runs.answers(rows)])


ONLINE = dict(
    num_generations=4, max_completion_length=6, per_device_train_batch_size=4, steps=6,
    given={"reward_funcs": vowels}, learning_rate=1e-4,
)  # fmt: skip
GRPO = {
    "grpo": {},
    "kl": {"beta": 0.1},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "temperature": {"temperature": 0.7},
    "entropy mask": {"top_entropy_quantile": 0.5},
    "lora": {"lora": ATTENTION, "beta": 0.1},
}


def online(trainer, config, folder, options):
    given = {**ONLINE, **options}
    settings = runs.settings(folder)
    settings.pop("max_length")
    lora = given.pop("lora", None)
    steps = given.pop("steps")
    extra = given.pop("given")
    if lora is not None:
        extra = extra | {"peft_config": peft.LoraConfig(**lora)}
    path = folder / "model"  # TRL loads its reference from where the policy came from
    runs.model().save_pretrained(path)
    made = trainer(
        model=LlamaForCausalLM.from_pretrained(path),
        args=config(**{**settings, "max_steps": steps, **given}),
        train_dataset=prompts(),
        processing_class=runs.tokenizer("left"),
        **extra,
    )
    made.train()
    return made


@pytest.mark.parametrize("name", GRPO)
def test_grpo(tmp_path, name):
    want = online(trl.GRPOTrainer, trl.GRPOConfig, tmp_path, GRPO[name])
    got = online(ours.GRPOTrainer, ours.GRPOConfig, tmp_path, GRPO[name])
    runs.assert_same_runs(got, want)


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_rloo(tmp_path, name):
    options = {"lora": ATTENTION} if name == "lora" else {}
    want = online(trl.RLOOTrainer, trl.RLOOConfig, tmp_path, options)
    got = online(ours.RLOOTrainer, ours.RLOOConfig, tmp_path, options)
    runs.assert_same_runs(got, want)


def test_a_deep_copy_of_a_fused_model_runs_its_own_weights(tmp_path):
    made = train(ours.SFTTrainer, ours.SFTConfig, tmp_path, texts(8), steps=1)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[5, 6, 7, 8]])}
    other = copy.deepcopy(made.model)
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1.0)
        want = made.model(**inputs, fused_lm_head=True).log_probs
        got = other(**inputs, fused_lm_head=True).log_probs
        logits = other(input_ids=inputs["input_ids"]).logits.log_softmax(-1)
    picked = logits[:, :-1].gather(-1, inputs["labels"][:, 1:, None])[..., 0]
    assert torch.allclose(got, picked, atol=1e-4) and not torch.allclose(got, want, atol=1e-2)
