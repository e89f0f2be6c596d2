"""The loop: denominators, layouts of data, losses with extra needs, logs, checkpoints, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import config, save_model, write_data

from prefkern.train import train
from prefkern.train.loop import train_run
from prefkern.train.run import describe, prepare

TRL_NAMES = {
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "step",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "num_tokens",
    "mean_token_accuracy",
}
FINAL_NAMES = {
    "train_loss",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
}


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def pairs(tmp_path):
    return write_data(tmp_path / "pairs.jsonl")


def weights(folder, name="model.safetensors"):
    return load_file(folder / name)


def largest_difference(a, b) -> float:
    assert a.keys() == b.keys()
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


def test_rows_files_and_names(tmp_path, model, pairs):
    out = tmp_path / "out"
    result = train(
        config(out, model, pairs, eval_dataset=pairs, loss=("tdpo2",), plots=True, save_steps=2)
    )
    rows = result["log_history"]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert (
            TRL_NAMES | {"kl/chosen", "kl/rejected", "kl/margin", "perf/tokens_per_second"}
            <= row.keys()
        )
    # policy and reference are the same numbers at step 0: the loss is ln 2, margins are exactly 0
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert steps[0]["rewards/margins"] == 0.0 and steps[0]["kl/chosen"] == 0.0
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 3]
    assert "eval_length_baseline" in evaluations[0] and "eval_rewards/accuracies" in evaluations[0]
    assert rows[-1].keys() >= FINAL_NAMES
    lines = [json.loads(line) for line in (out / "log_history.jsonl").read_text().splitlines()]
    assert lines == rows
    assert (out / "loss.png").is_file() and (out / "curves.png").is_file()

    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

    state = TrainerState.load_from_json(out / "trainer_state.json")
    assert state.global_step == state.max_steps == 3 and state.log_history == rows
    AutoTokenizer.from_pretrained(out)
    for folder in (out, out / "checkpoint-2"):
        AutoModelForCausalLM.from_pretrained(folder)
        assert not [
            p.name for p in folder.rglob("*") if p.suffix in (".pt", ".bin", ".pth", ".pkl")
        ]
    assert {
        "optimizer.safetensors",
        "optimizer.json",
        "scheduler.json",
        "rng_state.json",
        "trainer_state.json",
    } <= {p.name for p in (out / "checkpoint-2").iterdir()}


@pytest.mark.parametrize("loss", ["tdpo2", "simpo"])
def test_accumulation_changes_rounding_only(tmp_path, model, pairs, loss):
    common = dict(loss=(loss,), max_steps=4, learning_rate=1e-4)
    whole = train(config(tmp_path / "whole", model, pairs, per_device_train_batch_size=4, **common))
    parts = train(
        config(
            tmp_path / "parts",
            model,
            pairs,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            **common,
        )
    )
    for a, b in zip(whole["log_history"], parts["log_history"], strict=True):
        for name in a.keys() & {
            "loss",
            "rewards/margins",
            "rewards/accuracies",
            "entropy",
            "logps/chosen",
        }:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) < 1e-5


def test_denominators_are_global_with_a_short_last_micro_batch(tmp_path, model):
    data = write_data(tmp_path / "five.jsonl", rows=5)
    common = dict(loss=("dpo", "sft"), loss_weights=(1.0, 0.2), max_steps=1)
    whole = train(config(tmp_path / "whole", model, data, per_device_train_batch_size=5, **common))
    parts = train(
        config(
            tmp_path / "parts",
            model,
            data,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            **common,
        )
    )
    assert whole["log_history"][0]["loss"] == pytest.approx(
        parts["log_history"][0]["loss"], rel=1e-6
    )
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"packing": "off"},
        {"gradient_checkpointing": True},
        {"memory_budget": 0},
        {"token_budget": 400},
        {"attn_implementation": "eager", "packing": "on"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_options_that_must_not_change_the_result(tmp_path, model, pairs, changes):
    # one step over all the data, whatever the batches
    common = dict(
        per_device_train_batch_size=12, gradient_accumulation_steps=4, max_steps=1, loss=("tdpo1",)
    )
    plain = train(config(tmp_path / "plain", model, pairs, **common))["log_history"][0]
    other = train(config(tmp_path / "other", model, pairs, **common | changes))["log_history"][0]
    assert plain["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert plain["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=1e-5)
    if changes == {"memory_budget": 0}:
        assert largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "other")) == 0.0


@pytest.mark.parametrize(
    "changes", [{"bf16": True}, {"dtype": "bfloat16"}], ids=["autocast", "weights"]
)
def test_bfloat16(tmp_path, model, pairs, changes):
    result = train(config(tmp_path / "out", model, pairs, loss=("tdpo2",), **changes))
    assert result["log_history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    want = torch.bfloat16 if "dtype" in changes else torch.float32
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {want}


@pytest.mark.parametrize(
    ("loss", "layout", "options"),
    [
        ("kto", "unpaired", {}),
        ("apo_zero_unpaired", "unpaired", {}),
        ("lipo", "lists", {}),
        ("plackett_luce", "lists", {}),
        ("pro", "lists", {}),
        ("mapo", "pairs", {}),
        ("sparsepo", "pairs", {"mask_weight_decay": 0.5}),
        ("sparsepo", "pairs", {"loss_args": {"rw_kl_independent": False, "l1_norm_param_u": 1e-3}}),
        ("tgdpo", "pairs", {"aux_model": "AUX"}),
        ("ld_dpo", "pairs", {"loss_args": {"alpha": 0.2}}),
        ("ipo", "pairs", {}),
    ],
)
def test_every_layout_and_every_extra_need(tmp_path, model, loss, layout, options):
    data = write_data(tmp_path / "data.jsonl", layout)
    if "aux_model" in options:
        options = {"aux_model": save_model(tmp_path / "aux", seed=5)}
    run = prepare(
        config(
            tmp_path / "out",
            model,
            data,
            loss=(loss,),
            eval_dataset=data,
            max_steps=8,
            learning_rate=3e-3,
            **options,
        )
    )
    before = {k: v.detach().clone() for k, v in run.step.named_parameters()}
    rows = train_run(run)["log_history"]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert all(math.isfinite(x) for x in losses)
    moved = {k: not torch.equal(v, before[k]) for k, v in run.step.named_parameters()}
    assert all(moved.values()), [k for k, v in moved.items() if not v]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert held_out[-1] < held_out[0]  # the training data themselves: 8 steps must fit them better
    if layout == "lists":
        assert {"rank/ndcg", "rank/pair_accuracy"} <= rows[1].keys()
    if loss == "sparsepo":
        assert {"masks/reward_mean", "masks/reward_zeros"} <= rows[1].keys()
        assert (tmp_path / "out" / "masks.safetensors").is_file()


def test_kto_baseline_reaches_the_loss(tmp_path, model):
    """At step 0 every log-ratio is 0, so z = 0 and every row costs sigmoid(0)."""
    data = write_data(tmp_path / "data.jsonl", "unpaired")
    rows = train(config(tmp_path / "out", model, data, loss=("kto",), max_steps=1))["log_history"]
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-6)


def test_lora_trains_the_adapter_against_the_adapter_switched_off(tmp_path, model, pairs):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    options = dict(lora_r=4, learning_rate=1e-2, loss=("tdpo2",), eval_dataset=pairs)
    run = prepare(config(out, model, pairs, **options))
    assert run.facts["reference"] == "adapter" and run.facts["trainable"] < run.facts["parameters"]
    rows = train_run(run)["log_history"]
    assert rows[0]["eval_rewards/margins"] == 0.0
    assert rows[-2]["eval_rewards/margins"] > 0.0
    names = {p.name for p in out.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


def test_save_total_limit_and_folders_in_use(tmp_path, model, pairs):
    out = tmp_path / "out"
    train(config(out, model, pairs, max_steps=4, save_steps=1, save_total_limit=2))
    assert sorted(p.name for p in out.glob("*checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        prepare(config(out, model, pairs))
    train(config(out, model, pairs, max_steps=1, overwrite_output_dir=True))
    assert not list(out.glob("*checkpoint-*"))


def test_trackers_get_the_rows(tmp_path, model, pairs, monkeypatch):
    import accelerate.accelerator
    import accelerate.tracking
    from accelerate.tracking import GeneralTracker

    logged = []

    class Recorder(GeneralTracker):
        name, requires_logging_directory = "recorder", False

        def __init__(self):
            super().__init__(_blank=True)

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            logged.append(("config", values))

        def log(self, values, step=None, **_):
            logged.append((step, values))

    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr(accelerate.accelerator, "filter_trackers", lambda *_: [Recorder()])
    train(config(tmp_path / "out", model, pairs, report_to=("tensorboard",)))
    assert logged[0][0] == "config" and logged[0][1]["learning_rate"] == 1e-3
    assert [step for step, _ in logged[1:]] == [1, 2, 3, 3]
    assert "rewards/margins" in logged[1][1]


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, model, pairs):
    with pytest.raises(ValueError, match=r"the loss became .* at step 2, rows"):
        train(
            config(
                tmp_path / "out", model, pairs, learning_rate=1e30, max_grad_norm=0.0, max_steps=9
            )
        )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"loss": ("tdpo",)}, r"unknown loss 'tdpo'; nearest: .*tdpo"),
        ({"loss": ("tdpo2",), "loss_args": {"alhpa": 1.0}}, r"no argument 'alhpa'; nearest: alpha"),
        ({"loss": ("lipo",)}, "lipo.*trains on lists.*the data are pairs"),
        ({"loss": ("kto",)}, "kto.*trains on unpaired"),
        (
            {"loss": ("soft_label",)},
            r"loss 'soft_label' reads pref_prob from it: one number per row; --column "
            "pref_prob=NAME reads another column",
        ),
        (
            {"loss": ("tpo",)},
            "column 'gold': is missing; loss 'tpo' reads gold.*--column gold=NAME",
        ),
        ({"loss": ("mm_dpo",)}, r"'prompt_cond': is missing; loss 'mm_dpo'.*\(prompt_NAME\)"),
        ({"loss": ("tpo", "dpo")}, "read different answers of a row.*train them apart"),
        ({"loss": ("gkd",)}, "gkd learns from a teacher: pass it as --ref-model"),
        ({"columns": {"pref_prb": "p"}}, r"reads no column for 'pref_prb'; known: offset, pair_w"),
        ({"likelihood_prompt": True}, "loss dpo has no likelihood term"),
        ({"loss": ("tgdpo",)}, "--aux-model"),
        ({"max_length": 1000}, "context of 128"),
        ({"dataset": "/no/such/file.jsonl"}, "file.jsonl"),
        ({"resume_from_checkpoint": "/no/such"}, "not a checkpoint of this trainer"),
        ({"token_budget": 10}, "token_budget is 10"),
        ({"report_to": ("wandbx",)}, "wandbx is not installed here"),
    ],
)
def test_mistakes_before_the_first_step(tmp_path, model, pairs, changes, match):
    from tiny_models import config as make

    settings = {"model": model, "dataset": pairs} | changes
    run = make(tmp_path / "out", settings.pop("model"), settings.pop("dataset"), **settings)
    with pytest.raises((ValueError, OSError), match=match):
        train(run)


def test_rows_count_by_their_weight(tmp_path, model):
    rows = [
        {"prompt": "a", "chosen": " b", "rejected": " c"},
        {"prompt": "d", "chosen": " e", "rejected": " f"},
    ]
    losses = {}
    for name, weights in (("first", (1.0, 0.0)), ("second", (0.0, 1.0)), ("both", (2.0, 0.5))):
        file = tmp_path / f"{name}.jsonl"
        text = [json.dumps(r | {"weight": w}) for r, w in zip(rows, weights, strict=True)]
        file.write_text("\n".join(text) + "\n")
        run = config(tmp_path / name, model, str(file), loss=("simpo",), max_steps=1)
        losses[name] = train(run)["train_loss"]
    assert losses["both"] == pytest.approx(2 * losses["first"] + 0.5 * losses["second"], rel=1e-5)


def test_another_vocabulary_is_refused(tmp_path, model, pairs):
    other = save_model(tmp_path / "other", vocab_size=300)
    with pytest.raises(ValueError, match="share one vocabulary"):
        prepare(config(tmp_path / "out", model, pairs, ref_model=other))


@pytest.mark.parametrize("capped", ["policy", "reference"])
def test_the_soft_cap_of_a_model_is_its_own(tmp_path, pairs, capped):
    from transformers import AutoModelForCausalLM

    caps = {"policy": None, "reference": None, capped: 3.0}
    folders = {
        name: save_model(tmp_path / name, "gemma2", seed, final_logit_softcapping=cap)
        for seed, (name, cap) in enumerate(caps.items())
    }
    run = prepare(
        config(
            tmp_path / "out", folders["policy"], pairs, ref_model=folders["reference"], limit=1,
            loss_args={"beta": 1.0},
        )
    )  # fmt: skip
    row = train_run(run)["log_history"][0]
    seq, logps = run.examples[0].sequences[0], {}
    ids = torch.tensor(seq.input_ids[None].astype("int64"))
    for name, folder in folders.items():
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0, :-1]
        logp = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        logps[name] = logp[seq.completion_start - 1 :].sum().item()
    ratio = logps["policy"] - logps["reference"]
    assert row["rewards/chosen"] == pytest.approx(ratio, rel=1e-4)


def test_tokenizer_without_pad_and_without_eos(tmp_path, pairs):
    from tiny_tokenizer import byte_tokenizer

    folder = save_model(tmp_path / "nopad")
    assert prepare(config(tmp_path / "a", folder, pairs, packing="off")).pad_id == 0
    byte_tokenizer(eos=None).save_pretrained(folder)
    with pytest.raises(ValueError, match="eos_token"):
        prepare(config(tmp_path / "b", folder, pairs))
    assert prepare(config(tmp_path / "c", folder, pairs, append_eos=False)).examples


def test_a_model_that_cannot_be_packed_is_padded_and_told(tmp_path, pairs, capsys):
    folder = save_model(tmp_path / "mpt", "mpt")
    assert not prepare(config(tmp_path / "a", folder, pairs)).packed
    assert "padded, not packed: MptModel takes no position_ids" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot be packed"):
        prepare(config(tmp_path / "b", folder, pairs, packing="on"))


def test_dry_run_facts(tmp_path, model, pairs):
    facts = json.loads(describe(prepare(config(tmp_path / "out", model, pairs))))
    assert facts["config"]["max_steps"] == 3 and facts["data"]["groups"] == 12
    assert (
        facts["head"]["vocabulary"] == 260
        and facts["head"]["largest_difference_to_own_logits"] < 1e-5
    )
    assert not (tmp_path / "out").exists()
