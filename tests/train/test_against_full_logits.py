"""Twenty trainer steps against an independent implementation on full logits in plain torch.

Nothing of the package's losses, ops or reductions is used here: logits from the model's own
forward, one sequence at a time, log_softmax over the vocabulary, formulas written out again.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import DATA, STORIES, config, save_model, write_data
from tiny_tokenizer import byte_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from prefkern.train.loop import epoch_chunks, train_run
from prefkern.train.run import Run, prepare

STEPS, BETA = 20, 0.1


def scored_logits(model, sequence) -> tuple[Tensor, Tensor]:
    """Logits [n, V] of the rows that predict the answer, and the answer's tokens [n]."""
    ids = torch.tensor(sequence.input_ids.tolist())
    first = sequence.completion_start
    return model(ids[None]).logits[0, first - 1 : -1].float(), ids[first:]


def statistics(policy, reference, sequence) -> dict[str, Tensor]:
    """Sums over the answer: log-probability, the reference's, and KL(reference || policy)."""
    logits, answer = scored_logits(policy, sequence)
    with torch.no_grad():
        ref = scored_logits(reference, sequence)[0].log_softmax(-1)
    logp = logits.log_softmax(-1)
    rows = torch.arange(len(answer))
    return {
        "logp": logp[rows, answer].sum(),
        "ref": ref[rows, answer].sum(),
        "kl": (ref.exp() * (ref - logp)).sum(),
        "length": torch.tensor(float(len(answer))),
    }


def dpo(groups) -> Tensor:
    total = 0.0
    for w, r in groups:
        total = total + F.softplus(-BETA * ((w["logp"] - w["ref"]) - (r["logp"] - r["ref"])))
    return total / len(groups)


def tdpo2(groups) -> Tensor:
    total = 0.0
    for w, r in groups:
        margin = (w["logp"] - w["ref"]) - (r["logp"] - r["ref"])
        total = total + F.softplus(-BETA * (margin - 0.5 * (r["kl"] - w["kl"].detach())))
    return total / len(groups)


def simpo(groups) -> Tensor:
    total = 0.0
    for w, r in groups:
        margin = 2.0 * (w["logp"] / w["length"] - r["logp"] / r["length"]) - 0.5
        total = total + F.softplus(-margin)
    return total / len(groups)


LOSSES = {"dpo": dpo, "tdpo2": tdpo2, "simpo": simpo}


def independent(run: Run, name: str, base: str) -> tuple[list[float], dict[str, Tensor]]:
    """The same steps on the same batches; returns losses and final weights."""
    settings = run.config
    policy = AutoModelForCausalLM.from_pretrained(base).train()
    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    if hasattr(run.step.policy, "peft_config"):
        policy = copy.deepcopy(run.step.policy)  # with the adapter as the run starts it
        reference = copy.deepcopy(policy).eval()  # the model as given, its adapter included
    trained = [p for p in policy.parameters() if p.requires_grad]
    decay = [p for p in trained if p.dim() > 1]
    plain = [p for p in trained if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
    )
    losses: list[float] = []
    epoch = 0
    while len(losses) < STEPS:
        for chunk in epoch_chunks(run, epoch):
            if len(losses) == STEPS:
                break
            for group in optimizer.param_groups:  # linear warm-up over 2 steps, then down to 0
                step = len(losses)
                factor = step / 2 if step < 2 else (STEPS - step) / (STEPS - 2)
                group["lr"] = settings.learning_rate * factor
            groups = [
                [statistics(policy, reference, s) for s in run.examples[i].sequences]
                for indices in chunk
                for i in indices
            ]
            loss = LOSSES[name](groups)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
        epoch += 1
    return losses, dict(policy.named_parameters())


def compare(tmp_path, model: str, data: str, name: str, base: str = "", **options) -> None:
    """`base`: the folder of the reference, where that is not the model's."""
    settings = config(
        tmp_path / "out",
        model,
        data,
        loss=(name,),
        max_steps=STEPS,
        warmup_steps=2,
        weight_decay=0.1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        **options,
    )
    run = prepare(settings)
    assert run.packed
    want_losses, want = independent(run, name, base or model)
    start = copy.deepcopy(run.step.policy)
    rows = train_run(run)["log_history"]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == STEPS
    for ours, theirs in zip(losses, want_losses, strict=True):
        assert math.isclose(ours, theirs, rel_tol=1e-5, abs_tol=1e-5)
    for parameter, ours in run.step.policy.named_parameters():
        error = (ours - want[parameter]).abs().max().item()
        assert error <= 1e-5, f"{parameter}: {error:.2e}"
    # the comparison means something: the weights went far from where they started
    moved = max(
        (a - b).abs().max().item()
        for a, b in zip(start.parameters(), run.step.policy.parameters(), strict=True)
    )
    assert moved > 1e-4


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_twenty_steps_on_a_random_model(tmp_path, name):
    model, data = save_model(tmp_path / "model"), write_data(tmp_path / "pairs.jsonl", rows=20)
    compare(tmp_path, model, data, name, learning_rate=1e-4)


@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
@pytest.mark.parametrize("targets", ["on the head", "on everything", "on a tied head"])
def test_twenty_steps_of_lora_on_the_head(tmp_path, name, targets):
    tied = targets == "on a tied head"
    model = save_model(tmp_path / "model", tie_word_embeddings=tied)
    data = write_data(tmp_path / "pairs.jsonl", rows=20)
    modules = ("lm_head",) if targets == "on the head" else ("q_proj", "down_proj", "lm_head")
    compare(tmp_path, model, data, name, learning_rate=1e-3, lora_r=4, lora_target_modules=modules)


@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
def test_twenty_steps_of_a_head_in_modules_to_save(tmp_path, name):
    """The adapter brings a head of its own, and so does the reference, the model as given."""
    peft = pytest.importorskip("peft")
    base, data = save_model(tmp_path / "base"), write_data(tmp_path / "pairs.jsonl", rows=20)
    inner = AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    adapted = peft.get_peft_model(inner, settings)
    with torch.no_grad():
        torch.manual_seed(1)
        own = adapted.base_model.model.lm_head.modules_to_save["default"].weight
        own += 0.05 * torch.randn_like(own)
    model = str(tmp_path / "adapter")
    adapted.save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    compare(tmp_path, model, data, name, base, learning_rate=1e-4)


@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
def test_twenty_steps_with_a_soft_cap_and_tied_embeddings(tmp_path, name):
    model, data = save_model(tmp_path / "model", "gemma2"), write_data(tmp_path / "p.jsonl")
    compare(tmp_path, model, data, name, learning_rate=1e-4, packing="on")


@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
@pytest.mark.skipif(
    not (STORIES.is_dir() and DATA.is_dir()), reason="needs ../shared/models and data"
)
def test_twenty_steps_on_trained_weights_and_real_data(tmp_path, name):
    data = str(DATA / "hh_pairs_train.jsonl.gz")
    compare(tmp_path, str(STORIES), data, name, limit=60, max_length=512, learning_rate=5e-5)
