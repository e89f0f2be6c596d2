"""PreferenceModel in three loops, which give the same losses; and against full logits."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import torch
import trl_runs as runs
from ranks import run_ranks

import prefkern
from prefkern.integrations.collate import PairCollator
from prefkern.integrations.head_view import shifted
from prefkern.integrations.preference_model import PreferenceModel

EXAMPLES = Path(__file__).parents[2] / "examples"
WORKER = str(Path(__file__).with_name("preference_worker.py"))


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of a model, file of pairs)."""
    folder = tmp_path_factory.mktemp("recipes")
    runs.model().save_pretrained(folder / "model")
    runs.tokenizer().save_pretrained(folder / "model")
    rows = [dict(row) for row in runs.pairs(16)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "model"), str(folder / "pairs.jsonl")


# ---- recipes -------------------------------------------------------------------------------------


def test_three_loops_give_the_same_losses(saved, tmp_path):
    path, data = saved
    plain = example("plain_loop").train(path, data, rate=1e-3)
    assert len(plain) == 4 and plain[0] == pytest.approx(0.6931, abs=1e-4)
    assert plain[-1] != pytest.approx(plain[0], abs=1e-3)
    assert example("accelerate_loop").train(path, data, rate=1e-3) == pytest.approx(plain, rel=1e-6)
    trainer = example("transformers_trainer").train(
        path, data, str(tmp_path), learning_rate=1e-3, per_device_train_batch_size=4,
        logging_steps=1, max_steps=4, lr_scheduler_type="constant", use_cpu=True, report_to=[],
        save_strategy="no", max_grad_norm=0, weight_decay=0.01, adam_epsilon=1e-8,
        dataloader_pin_memory=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(plain, rel=1e-4)
    assert any("rewards/margins" in row for row in trainer.state.log_history)
    assert (tmp_path / "model.safetensors").is_file()


def test_lightning_gives_the_same_losses(saved, tmp_path):
    lightning = pytest.importorskip("lightning")
    path, data = saved
    seen = []

    class Note(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            seen.append(outputs["loss"].item())

    example("lightning_module").train(
        path, data, rate=1e-3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Note()],
        default_root_dir=str(tmp_path),
    )  # fmt: skip
    plain = example("plain_loop").train(path, data, rate=1e-3)
    assert seen == pytest.approx(plain, rel=1e-6)


def test_accumulation_averages(saved, tmp_path):
    """Two batches of two pairs are one of four: the Trainer divides, once."""
    path, data = saved
    options = dict(
        learning_rate=1e-3, max_steps=3, logging_steps=1, lr_scheduler_type="constant",
        use_cpu=True, report_to=[], save_strategy="no", dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    train = example("transformers_trainer").train
    one = train(path, data, str(tmp_path / "a"), per_device_train_batch_size=4, **options)
    two = train(
        path, data, str(tmp_path / "b"), per_device_train_batch_size=2,
        gradient_accumulation_steps=2, **options,
    )  # fmt: skip
    rows = [
        [(r["loss"], r["grad_norm"]) for r in t.state.log_history if "grad_norm" in r]
        for t in (one, two)
    ]
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=2e-4)


# ---- against full logits -------------------------------------------------------------------------


def batch(rows=4, **more):
    made = PairCollator(runs.tokenizer(), 32)([dict(row) for row in runs.pairs(rows)])
    return made | more


def full(policy, reference, inputs, loss, stats, **arguments):
    targets = shifted(inputs["labels"])
    plain = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    ref_logits = None
    if reference is not None:
        with torch.no_grad():
            ref_logits = reference(**plain).logits
    tokens = prefkern.logits_logps(
        policy(**plain).logits, targets, ref_logits=ref_logits, stats=("logp", *stats)
    )
    return prefkern.loss_from_stats(tokens, targets, loss=loss, metrics=False, **arguments)[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("loss", "stats", "reference"),
    [("dpo", ("ref_logp",), True), ("tdpo2", ("ref_logp", "fkl"), True), ("simpo", (), False)],
)
def test_loss_and_gradients(loss, stats, reference, packed):
    inputs = batch()
    policy, other = runs.model(), runs.model()
    ref = runs.perturbed(policy) if reference else None
    full(other, runs.perturbed(other) if reference else None, inputs, loss, stats).backward()
    out = PreferenceModel(policy, loss, ref=ref, packed=packed)(**inputs)
    out.loss.backward()
    theirs = dict(other.named_parameters())
    compared = 0
    for name, p in policy.named_parameters():
        assert torch.allclose(p.grad, theirs[name].grad, rtol=1e-3, atol=1e-6), name
        compared += 1
    assert compared == len(theirs) and out.metrics


def test_the_reference_of_a_peft_model_is_its_base():
    peft = pytest.importorskip("peft")
    base, inputs = runs.model(), batch()
    reference = runs.model()
    policy = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False,
                              lora_dropout=0.5, task_type="CAUSAL_LM"),
    )  # fmt: skip
    made = PreferenceModel(policy, "tdpo2").eval()
    want = full(policy, reference, inputs, "tdpo2", ("ref_logp", "fkl"))
    assert made(**inputs).loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert made.train() is made and policy.training


def test_log_probabilities_of_the_reference_with_the_batch():
    inputs, policy = batch(), runs.model()
    reference = runs.perturbed(policy)
    whole = PreferenceModel(policy, "dpo", ref=reference)(**inputs)
    with torch.no_grad():
        logits = reference(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).logits
        logp = prefkern.logits_logps(logits, shifted(inputs["labels"])).logp
    alone = PreferenceModel(policy, "dpo")
    assert alone(**inputs, ref_logp=logp).loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    sums = logp.double().sum(1)
    assert alone(**inputs, ref_seq_logp=sums).loss.item() == pytest.approx(
        whole.loss.item(), rel=1e-5
    )
    with pytest.raises(ValueError, match="reads a reference, and there is none"):
        alone(**inputs)


def test_lists_labels_and_weights():
    inputs, policy = batch(6), runs.model()
    scores = torch.tensor([3.0, 1, 2, 0, 1, 2, 0, 1, 3, 2, 1, 0])
    groups = torch.tensor([0, 3, 8, 12], dtype=torch.int32)
    out = PreferenceModel(policy, "pro")(**inputs, cu_groups=groups, relevance=scores)
    assert torch.isfinite(out.loss) and "rank/ndcg" in out.metrics
    reference = runs.perturbed(policy)
    weights = torch.tensor([1.0, 0, 2, 0, 1, 1])
    weighted = PreferenceModel(policy, "dpo", ref=reference)(**inputs, item_weights=weights)
    want = full(
        policy, reference, inputs, "dpo", ("ref_logp",), item_weights=weights
    )  # fmt: skip
    assert weighted.loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_what_is_saved_and_moved():
    policy = runs.model()
    made = PreferenceModel(policy, "dpo", ref=runs.perturbed(policy))
    assert set(made.state_dict()) == {f"model.{name}" for name in policy.state_dict()}
    assert len(list(made.parameters())) == len(list(policy.parameters()))
    made.double()
    assert {p.dtype for p in made._others[0].parameters()} == {torch.float64}
    out = made(**batch())
    assert out.loss.dtype == torch.float64


def test_router_losses_are_added():
    policy, inputs = runs.model("mixtral"), batch()
    out = PreferenceModel(policy, "simpo")(**inputs)
    assert out.metrics["aux_loss"] > 0
    plain = full(policy, None, inputs, "simpo", ())
    coefficient = policy.config.router_aux_loss_coef
    assert out.loss.item() == pytest.approx(
        plain.item() + coefficient * out.metrics["aux_loss"].item(), rel=1e-5
    )


REFUSED = {
    "unknown": (dict(loss="tdpo3"), "nearest"),
    "argument": (dict(loss="tdpo2", alfa=1.0), "no argument 'alfa'"),
    "reference": (dict(loss="simpo", ref=1), "reads no reference; drop ref"),
    "third": (dict(loss="dpo", aux=1), "reads no third model; drop aux"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_it_is_made(name):
    options, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        PreferenceModel(runs.model(), **options)


def test_labels_are_asked_for():
    inputs = batch()
    made = PreferenceModel(runs.model(), "simpo")
    want = made(**inputs).loss.item()
    labels = inputs.pop("labels")
    with pytest.raises(ValueError, match="exactly one of labels and shift_labels"):
        made(**inputs)
    assert made(**inputs, shift_labels=shifted(labels)).loss.item() == want


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path):
    run_ranks(tmp_path, WORKER, "ddp", 2)


def test_a_deep_copy_runs_its_own_weights():
    """ref = copy.deepcopy(policy), after the policy was given at_head."""
    policy, inputs = runs.model(), batch()
    made = PreferenceModel(policy, "simpo")
    before = made(**inputs).loss.item()
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1.0)
    assert made(**inputs).loss.item() == before
    assert PreferenceModel(other, "simpo")(**inputs).loss.item() != pytest.approx(before)
    assert torch.equal(other(inputs["input_ids"]).logits, other(inputs["input_ids"]).logits)
    assert not torch.equal(other(inputs["input_ids"]).logits, policy(inputs["input_ids"]).logits)
