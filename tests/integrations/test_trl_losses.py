"""Prefkern's losses as loss_type of DPOTrainer: equal to full logits, for every kind of data."""

from __future__ import annotations

import pytest

trl = pytest.importorskip("trl")

import peft  # noqa: E402
import torch  # noqa: E402
import trl_runs as runs  # noqa: E402
from full_logits import FullLogits  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402

import prefkern  # noqa: E402
from prefkern.integrations import trl as ours  # noqa: E402
from prefkern.integrations.trl.batches import WithColumns  # noqa: E402
from prefkern.integrations.trl.plan import DPO_TYPES  # noqa: E402

_ATTENTION = ["q_proj", "v_proj"]
ADAPTERS = {
    "full": None,
    "lora": dict(target_modules="all-linear"),
    "lora on the head": dict(target_modules=[*_ATTENTION, "lm_head"], lora_dropout=0.1),
    "saved head": dict(target_modules=_ATTENTION, modules_to_save=["lm_head"]),
}


def train(
    trainer, folder, loss, *, dataset=None, adapter="full", family="llama", steps=4, train=True,
    reference=True, aux=False, cls=None, **options,
):  # fmt: skip
    policy = runs.model(family)
    arguments = {}
    if ADAPTERS[adapter] is not None:
        settings = dict(r=4, lora_alpha=8, init_lora_weights=False) | ADAPTERS[adapter]
        arguments["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    elif reference:
        arguments["ref_model"] = runs.perturbed(policy)
    if aux:
        arguments["aux_model"] = runs.perturbed(policy, 0.05)
    config = (cls or ours.DPOConfig)(
        **runs.settings(folder, loss_type=loss, **{"max_steps": steps} | options)
    )
    made = trainer(
        model=policy,
        args=config,
        train_dataset=runs.pairs() if dataset is None else dataset,
        processing_class=runs.tokenizer(),
        **arguments,
    )
    if train:
        made.train()
    return made


def compare(folder, loss, **options):
    padding_free = options.pop("padding_free", False)
    want = train(FullLogits, folder, loss, **options)
    got = train(ours.DPOTrainer, folder, loss, padding_free=padding_free, **options)
    runs.assert_same_runs(got, want)
    return got


PAIRS = {
    "tdpo1": {}, "tdpo2": {}, "tdpo2:alpha=0.3, beta=0.2": {}, "simpo": {"reference": False},
    "cpo": {"reference": False}, "orpo": {"reference": False}, "dpop": {}, "ld_dpo": {}, "wpo": {},
    "r_dpo": {}, "tgdpo": {"aux": True}, "apo_zero_unpaired": {}, "distill": {}, "gkd": {},
}  # fmt: skip
FAST = {"tdpo2", "simpo", "orpo", "ld_dpo", "tgdpo"}
_EVERY = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PAIRS]


@pytest.mark.parametrize("loss", _EVERY)
@pytest.mark.parametrize("adapter", list(ADAPTERS))
@pytest.mark.parametrize("packed", [False, True])
def test_pairs_equal_full_logits(tmp_path, loss, adapter, packed):
    if packed and "dropout" in str(ADAPTERS[adapter]):
        pytest.skip("dropout draws other numbers for other rows")
    compare(tmp_path, loss, adapter=adapter, padding_free=packed, **PAIRS[loss])


@pytest.mark.parametrize("family", ["gemma2"])
def test_soft_caps_and_tied_heads(tmp_path, family):
    compare(tmp_path, "tdpo2", family=family)
    compare(tmp_path, "tdpo2", family=family, adapter="lora on the head")


def test_mixtures_of_losses(tmp_path):
    got = compare(
        tmp_path, ["tdpo2", "sft", "simpo:beta=1.5"], loss_weights=[1.0, 0.1, 0.3],
        loss_args={"alpha": 0.2},
    )  # fmt: skip
    row = runs.history(got)[0]
    assert row["beta/tdpo2"] == 0.1 and row["beta/simpo"] == 1.5 and "beta" not in row
    assert {"loss/tdpo2", "loss/sft", "loss/simpo"} <= row.keys()
    parts = row["loss/tdpo2"] + 0.1 * row["loss/sft"] + 0.3 * row["loss/simpo"]
    assert row["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "beta"),
    [({}, 2.0), ({"beta": 0.1}, 2.0), ({"beta": 0.5}, 0.5), ({"loss_args": {"beta": 0.1}}, 0.1)],
)
def test_a_losss_own_beta_holds_unless_it_was_changed(tmp_path, options, beta):
    made = train(ours.DPOTrainer, tmp_path, "simpo", reference=False, steps=1, **options)
    assert runs.history(made)[0]["beta"] == beta
    want = train(FullLogits, tmp_path, f"simpo:beta={beta}", reference=False, steps=1)
    assert runs.history(made)[0]["loss"] == pytest.approx(runs.history(want)[0]["loss"], rel=1e-5)


def test_a_loss_without_reference_loads_none(tmp_path):
    """TRL would load a second copy of the policy from its folder; there is none here."""
    made = train(ours.DPOTrainer, tmp_path, "simpo", reference=False, train=False)
    assert made.ref_model is None


# ---- what a row of the data set brings -----------------------------------------------------------


def test_columns_of_numbers(tmp_path):
    rows = runs.pairs(
        pref_prob=lambda i: (i % 5) / 4, w=lambda i: float(i % 3), gap=lambda i: 0.1 * i,
    )  # fmt: skip
    columns = {"item_weights": "w", "offset": "gap"}
    compare(tmp_path, "soft_label", dataset=rows)
    weighted = compare(tmp_path, "dpo", dataset=rows, loss_columns=columns)
    plain = train(ours.DPOTrainer, tmp_path, "dpo", dataset=rows, loss_args={"beta": 0.1})
    assert runs.history(weighted)[0]["loss"] != pytest.approx(
        runs.history(plain)[0]["loss"], rel=0.01
    )


def test_a_column_is_read_only_where_it_was_asked_for(tmp_path):
    """A column named like an argument of a loss that can do without it changes nothing."""
    rows = runs.pairs(item_weights=lambda i: 0.0, offset=lambda i: 9.0)
    with_columns = train(ours.DPOTrainer, tmp_path, "tdpo2", dataset=rows)
    without = train(ours.DPOTrainer, tmp_path, "tdpo2")
    assert runs.history(with_columns) == runs.history(without)


def test_numbers_per_answer_and_per_token(tmp_path):
    plain = runs.pairs()

    def per_token(role, sign):
        def make(i):
            return [sign * 0.1 * (j + i % 3) for j in range(len(plain[i][role]) + 1)]

        return make

    rows = runs.pairs(
        chosen_baseline_mean_logps=lambda i: -4.0 - i % 2,
        rejected_baseline_mean_logps=lambda i: -5.0,
        chosen_positive_logp=per_token("chosen", -1),
        rejected_positive_logp=per_token("rejected", -1),
        chosen_negative_logp=per_token("chosen", -2),
        rejected_negative_logp=per_token("rejected", -2),
    )  # fmt: skip
    compare(tmp_path, "poft", dataset=rows, reference=False)
    compare(tmp_path, "tisdpo", dataset=rows)
    compare(tmp_path, "tisdpo", dataset=rows, max_length=14)


def test_token_columns_stand_at_the_positions_that_score_them():
    wrapped = WithColumns(DataCollatorForPreference(0, 6), {"aux_logp": "aux"}, "pairs", 6)
    examples = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6],
         "chosen_aux": [0.3, 0.4, 0.5], "rejected_aux": [0.6]},
        {"prompt_ids": [7, 8, 9], "chosen_ids": [1], "rejected_ids": [2, 3, 4, 5, 6],
         "chosen_aux": [0.1], "rejected_aux": [0.2, 0.3, 0.4, 0.5, 0.6]},
    ]  # fmt: skip
    batch = wrapped(examples)
    assert batch["input_ids"].shape == (4, 6)
    want = torch.tensor([
        [0, 0.3, 0.4, 0.5, 0, 0], [0, 0, 0.1, 0, 0, 0],
        [0, 0.6, 0, 0, 0, 0], [0, 0, 0.2, 0.3, 0.4, 0],
    ], dtype=torch.float64)  # fmt: skip
    assert torch.equal(batch["loss_columns"]["aux_logp"], want)


@pytest.mark.parametrize("loss", ["tpo", "tpo_l"])
def test_groups_of_three_answers(tmp_path, loss):
    rows = runs.pairs(best=lambda i: f" gold{i % 4}")
    got = compare(
        tmp_path, loss, dataset=rows, reference=False, loss_columns={"gold": "best"},
        padding_free=True,
    )  # fmt: skip
    assert "rewards/accuracies" in runs.history(got)[0]


LISTS = {
    "lipo": {}, "plackett_luce": {}, "approx_ndcg": {}, "softmax": {}, "list_mle": {},
    "pro": {"reference": False}, "rrhf": {"reference": False}, "infonca": {},
    "pair_logistic": {}, "bialign": {},
}  # fmt: skip


@pytest.mark.parametrize("adapter", ["full", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loss", LISTS)
def test_ranked_lists_equal_full_logits(tmp_path, loss, adapter):
    got = compare(
        tmp_path, loss, dataset=runs.lists(), adapter=adapter, padding_free=adapter == "full",
        **LISTS[loss],
    )  # fmt: skip
    assert {"rank/ndcg", "rank/kendall_tau"} <= runs.history(got)[0].keys()


def test_lists_are_tokenised_as_pairs_are(tmp_path):
    """A list of two answers holds the pair's ids; its row order is the batch's."""
    pairs = runs.pairs()
    rows = pairs.map(
        lambda e: {"completions": [e["chosen"], e["rejected"]], "scores": [1.0, 0.0]},
        remove_columns=["chosen", "rejected"],
    )
    one = train(ours.DPOTrainer, tmp_path, "tdpo2", dataset=pairs, train=False).train_dataset
    many = train(ours.DPOTrainer, tmp_path, "lipo", dataset=rows, train=False)
    for a, b in zip(one, many.train_dataset, strict=True):
        assert a["prompt_ids"] == b["prompt_ids"]
        assert [a["chosen_ids"], a["rejected_ids"]] == b["completion_ids"]
    batch = many.data_collator([many.train_dataset[i] for i in range(3)])
    assert batch["cu_groups"].tolist() == [0, 2, 4, 6]
    assert batch["relevance"].tolist() == [1, 0, 1, 0, 1, 0]
    assert batch["input_ids"].shape == batch["completion_mask"].shape


# ---- every loss by its name ----------------------------------------------------------------------

# What a loss without a source for its tensors says.
_REFUSED = {
    "mapo": "hidden states of single blocks", "mm_dpo": "column", "more": "several judges",
    "soft_pairs": "positions of answers", "kto": "kl_baseline", "tree_tpo": "step_index",
    "adpa": "aux_model", "fdpg": "log_target_prob",
}  # fmt: skip
_GIVEN = {
    "rm_margin", "pref_prob", "judge_logit_gap", "slow_chosen_logps", "slow_rejected_logps", "topk",
    "margin_reward_chosen", "margin_reward_rejected", "source_chosen_mean_logps",
    "source_rejected_mean_logps", "score_chosen", "score_rejected",
}  # fmt: skip
_SEVERAL = {  # a list per row
    "margin_reward_chosen", "margin_reward_rejected", "source_chosen_mean_logps",
    "source_rejected_mean_logps",
}  # fmt: skip
NAMES = [n for n, r in prefkern.LOSSES.items() if r.family in ("pairwise", "pointwise", "listwise")]


@pytest.mark.parametrize("loss", NAMES)
def test_every_loss_trains_or_says_what_it_needs(tmp_path, loss):
    record = prefkern.LOSSES[loss]
    numbers = {"pref_prob": 0.7, "topk": 1} | {name: [0.3] for name in _SEVERAL}
    row = {name: numbers.get(name, 0.3) for name in _GIVEN}
    if record.family == "listwise":
        dataset = runs.lists(topk=lambda i, n: 1)
    else:
        plain = runs.pairs()
        tokens = {
            f"{role}_{name}": (lambda i, role=role: [-1.0] * (len(plain[i][role]) + 1))
            for role in ("chosen", "rejected")
            for name in ("positive_logp", "negative_logp", "oracle_logp", "oracle_ref_logp")
        }  # fmt: skip
        means = {f"{role}_baseline_mean_logps": (lambda i: -5.0) for role in ("chosen", "rejected")}
        numbers = {name: (lambda i, v=value: v) for name, value in row.items()}
        dataset = runs.pairs(gold=lambda i: " best", **numbers, **tokens, **means)
    options = dict(dataset=dataset, steps=2, aux=loss == "tgdpo")
    options["reference"] = record.needs_reference or any("kl" in s for s in record.stats)
    if loss in (*DPO_TYPES, "dckd", "distill", "gkd", "bialign"):
        options["reference"] = True
    if loss in _REFUSED:
        with pytest.raises(ValueError, match=_REFUSED[loss]):
            train(ours.DPOTrainer, tmp_path, loss, train=False, **options)
        return
    name = f"{loss}:label_smoothing=0.001" if loss == "exo_pair" else loss
    made = train(ours.DPOTrainer, tmp_path, name, **options)
    rows = runs.history(made)
    assert len(rows) == 3 and all(torch.isfinite(torch.tensor(r["loss"])) for r in rows[:2])
    assert rows[0]["grad_norm"] > 0
