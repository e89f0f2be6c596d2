"""Options of TRL together, a covering set: each run has what several of the single variants have.

The pairs of a run differ in one thing, the module the trainer comes from.
"""

from __future__ import annotations

import json

import pytest

trl = pytest.importorskip("trl")

import peft  # noqa: E402
import torch  # noqa: E402
import trl_runs as runs  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from prefkern.integrations import trl as ours  # noqa: E402

CHAT = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '[assistant]' }}"
    "{% generation %}{{ m.content + '</s>' }}{% endgeneration %}"
    "{% else %}{{ '[' + m.role + ']' + m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TOOLS = json.dumps([{"type": "function", "function": {"name": "add"}}])


def tokenizer(side="right"):
    made = runs.tokenizer(side)
    made.chat_template = CHAT
    return made


def said(role, text):
    return [{"role": role, "content": text}]


def chat(rows, *answers, **columns):
    return Dataset.from_list([
        {"prompt": said("user", row["prompt"])}
        | {name: said("assistant", row[name]) for name in answers}
        | {name: value(i, row) for name, value in columns.items()}
        for i, row in enumerate(rows)
    ])  # fmt: skip


def lora(**options):
    torch.manual_seed(3)
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"],
        **options,
    )  # fmt: skip


def settings(folder, **options):
    quick = {"max_steps": 4, "learning_rate": 1e-4}
    return runs.settings(folder, **quick | options)


def tools_and_weights(module, folder, **more):
    """Tools in every second conversation, the end kept of what is too long, a bias on the head, a
    reference that follows the policy, two losses, WPO's weights, LD-DPO, batches of 3, 3, 1."""
    policy = runs.model("phi")
    rows = chat(runs.pairs(7), "chosen", "rejected", tools=lambda i, _: TOOLS if i % 2 else None)
    return module.DPOTrainer(
        model=policy, ref_model=runs.perturbed(policy), train_dataset=rows,
        processing_class=tokenizer(), args=module.DPOConfig(**settings(
            folder, loss_type=["sigmoid", "apo_zero"], loss_weights=[1.0, 0.5],
            use_weighting=True, ld_alpha=0.4, label_smoothing=0.1, max_length=56,
            truncation_mode="keep_end", sync_ref_model=True, ref_model_mixup_alpha=0.5,
            ref_model_sync_steps=2, per_device_train_batch_size=3, **more,
        )),
    )  # fmt: skip


def trained_adapter(module, folder, **more):
    """A model that comes with its adapter, whose copy is the reference; soft cap, an f-divergence,
    accumulation, two evaluation sets with a last batch of one pair, metrics of the logits."""
    policy = peft.get_peft_model(runs.model("gemma2"), lora())
    return module.DPOTrainer(
        model=policy, train_dataset=runs.pairs(12), processing_class=tokenizer("left"),
        eval_dataset={"a": runs.pairs(3), "b": runs.pairs(2)},
        compute_metrics=lambda e: {"size": float(abs(e.predictions).mean())},
        args=module.DPOConfig(**settings(
            folder, loss_type=["hinge", "discopop"], f_divergence_type="js_divergence", beta=0.3,
            per_device_train_batch_size=1, gradient_accumulation_steps=3, eval_strategy="steps",
            eval_steps=2, per_device_eval_batch_size=2, **more,
        )),
    )  # fmt: skip


def streamed(module, folder, **more):
    """A stream of rows, a mixture's routers, checkpointing, one width for all batches."""
    policy = runs.model("mixtral")
    return module.DPOTrainer(
        model=policy, ref_model=runs.perturbed(policy), processing_class=tokenizer(),
        train_dataset=runs.pairs(16).to_iterable_dataset(),
        args=module.DPOConfig(**settings(
            folder, loss_type=["aot", "bco_pair"], loss_weights=[0.7, 1.2], pad_to_multiple_of=8,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
            **more,
        )),
    )  # fmt: skip


def virtual_tokens(module, folder):
    """Prompt tuning: TRL takes the virtual tokens' positions off again."""
    return module.DPOTrainer(
        model=runs.model(), train_dataset=runs.pairs(8), processing_class=tokenizer(),
        peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        args=module.DPOConfig(**settings(folder, loss_type="robust", label_smoothing=0.1)),
    )  # fmt: skip


def kto_conversations(module, folder):
    policy = runs.model(tie_word_embeddings=True)
    rows = chat(runs.answers(11), "completion", label=lambda _, row: row["label"])
    return module.KTOTrainer(
        model=policy, ref_model=runs.perturbed(policy), train_dataset=rows,
        processing_class=tokenizer(), args=module.KTOConfig(**settings(
            folder, desirable_weight=1.5, undesirable_weight=0.7, sync_ref_model=True,
            ref_model_mixup_alpha=0.5, ref_model_sync_steps=2, per_device_train_batch_size=3,
        )),
    )  # fmt: skip


def sft_packed_conversations(module, folder):
    """Tokens of the assistant alone, several conversations in a row, DFT, LoRA."""
    rows = Dataset.from_list([
        {"messages": said("user", r["prompt"]) + said("assistant", r["chosen"])
         + said("user", "x") + said("assistant", r["rejected"])}
        for r in runs.pairs(12)
    ])  # fmt: skip
    return module.SFTTrainer(
        model=runs.model(), train_dataset=rows, processing_class=tokenizer(), peft_config=lora(),
        args=module.SFTConfig(**settings(
            folder, loss_type="dft", assistant_only_loss=True, packing=True, max_length=96,
            per_device_train_batch_size=2,
        )),
    )  # fmt: skip


def grpo_sequences(module, folder):
    """Ratios of sequences, two epochs on each batch, two rewards, an entropy bonus, a KL."""
    path = folder / "model"
    runs.model().save_pretrained(path)
    options = settings(
        folder, loss_type="grpo", importance_sampling_level="sequence", num_iterations=2,
        scale_rewards="batch", reward_weights=[1.0, 0.5], beta=0.1, entropy_coef=0.01, epsilon=0.01,
        epsilon_high=0.02, temperature=0.7, num_generations=4, max_completion_length=5,
        mask_truncated_completions=True,
    )  # fmt: skip
    options.pop("max_length")
    return module.GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(path), processing_class=tokenizer("left"),
        train_dataset=Dataset.from_list([{"prompt": r["prompt"]} for r in runs.answers(8)]),
        reward_funcs=[
            lambda completions, **_: [float(len(set(text))) for text in completions],
            lambda completions, **_: [-0.1 * sum(map(ord, text)) % 7 for text in completions],
        ],
        args=module.GRPOConfig(**options),
    )  # fmt: skip


PACKED = (tools_and_weights, trained_adapter, streamed)
ALL = (*PACKED, virtual_tokens, kto_conversations, sft_packed_conversations, grpo_sequences)


@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_together(tmp_path, make):
    want = make(trl, tmp_path)
    want.train()
    others = [{}, {"padding_free": True}] if make in PACKED else [{}]
    for more in others:
        got = make(ours, tmp_path, **more)
        got.train()
        runs.assert_same_runs(got, want)
