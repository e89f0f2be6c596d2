"""Who supplies a loss's tensors: everything that is required comes from somewhere, once."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import config, save_model, write_data

from prefkern import losses
from prefkern.losses import LOSSES
from prefkern.train import train
from prefkern.train.data import Encoded, Example, SkipReport
from prefkern.train.data_providers import COUNTS, Columns, StepCounts, tensor_arguments
from prefkern.train.deal import deal
from prefkern.train.loop import train_run
from prefkern.train.providers import supplied
from prefkern.train.recipes.table import PROVIDERS, offers
from prefkern.train.run import plan, prepare

# What must be asked for by an option before a loss of that name can be planned at all.
OPTIONS = {
    "tgdpo": {"aux_model": "a"}, "adpa": {"aux_model": "a"},
    "pal": {"head": "reward", "num_outputs": 2}, "more": {"head": "reward"},
}  # fmt: skip
PLANNED = [n for n, r in LOSSES.items() if r.family != "diffusion"]


def settings(name: str, **changes):
    return config("out", "m", "d", loss=(name,), **OPTIONS.get(name, {}) | changes)


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.filterwarnings("ignore:loss .* is provisional")
def test_everything_that_a_loss_requires_is_supplied(name):
    run = settings(name)
    records, providers = plan(run)
    assert set(losses.required(records[0])) <= supplied(records[0], run, providers)
    # and each tensor by one provider alone
    given = [tensor for p in providers for tensor in p.supplies(records[0]) - {"desirable"}]
    assert len(given) == len(set(given))


def test_what_nothing_supplies_is_named_before_anything_loads():
    with pytest.raises(ValueError, match="loss 'more' is its method only with --head reward"):
        plan(settings("more", head="lm"))


def test_every_provider_serves_a_loss_or_an_option():
    kinds = {type(p) for name in PLANNED for p in plan(settings(name))[1]}
    for name, changes in (
        ("dpo_second_reference", {"slow_learning_rate": 1e-3, "lora_r": 2}),
        ("infifpo", {"fused_ref": ("c",)}),
        ("poft", {"precomputed_baseline": ("c",)}),
        ("dpo", {"sync_ref_model": True}),
        ("tree_tpo", {"step_pattern": "#"}),
        ("d2o", {"rejected_ref_model": "m"}),
        ("mm_dpo", {"image_column": "image"}),
    ):
        kinds |= {type(p) for p in plan(settings(name, **changes))[1]}
    assert kinds == {*PROVIDERS, Columns}


@pytest.mark.parametrize(
    ("name", "tensor", "how"),
    [
        ("dpo_second_reference", "slow_chosen_logps", "--slow-learning-rate"),
        ("infifpo", "source_chosen_mean_logps", "--fused-ref"),
        ("fdpg", "log_target_prob", "--round-data online"),
        ("soft_label", "pref_prob", "--round-data online"),
        ("tree_tpo", "step_index", "--step-pattern"),
        ("madpo", "rm_margin", ""),
    ],
)
@pytest.mark.filterwarnings("ignore:loss .* is provisional")
def test_a_missing_column_says_what_else_would_supply_it(name, tensor, how):
    _, providers = plan(settings(name))
    column = next(p for p in providers if isinstance(p, Columns)).columns[tensor]
    detail = column.missing(column.column).detail
    assert f"reads {tensor} from it" in detail and f"--column {tensor}=NAME" in detail
    assert (f"{how} supplies it without one" in detail) == bool(how)
    assert offers().get(tensor, "") == how


def test_a_provider_takes_the_place_of_a_column():
    run = settings("dpo_second_reference", slow_learning_rate=1e-3, lora_r=2)
    columns = next(p for p in plan(run)[1] if isinstance(p, Columns))
    assert not columns.columns and columns.supplies(LOSSES["dpo"]) == {"desirable"}


def test_a_number_of_the_user_takes_the_place_of_a_column():
    assert Columns(settings("madpo"), [LOSSES["madpo"]]).columns.keys() == {"rm_margin"}
    own = settings("madpo", loss_args={"rm_margin": 0.5})
    assert not Columns(own, [LOSSES["madpo"]]).columns
    both = settings("dpo", columns={"pair_weight": "w"}, loss_args={"pair_weight": 2.0})
    with pytest.raises(ValueError, match="both give 'pair_weight', the column 'w' and 2"):
        Columns(both, [LOSSES["dpo"]])


def test_numbers_of_tokens_reach_a_loss_packed():
    columns = Columns(settings("tgdpo", columns={"aux_logp": "c"}), [LOSSES["tgdpo"]])
    aux, rows = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    batch = SimpleNamespace(columns={"pair_weight": rows}, numbers={"aux_logp": aux})
    found = columns.arguments(SimpleNamespace(batch=batch), None)
    assert found.keys() == {"aux_logp"} and found["aux_logp"].tolist() == [0, 1, 2, 3, 4, 5]


def test_arguments_that_may_be_tensors():
    assert tensor_arguments(LOSSES["dpo"]) == ["pair_weight", "offset", "beta"]
    assert "undesirable_weight" in tensor_arguments(LOSSES["bco"])
    assert "undesirable_weight" not in tensor_arguments(LOSSES["kto"])  # one number for all rows


def example(*lengths: int, **columns) -> Example:
    """Answers with so many scored tokens after a prompt of two."""
    sequences = tuple(Encoded(np.arange(2 + n, dtype=np.int32), 2) for n in lengths)
    return Example(row=0, sequences=sequences, columns=columns)


def test_counts_of_a_step_by_hand():
    pairs = [example(3, 8), example(5, 1)]
    assert COUNTS["tokens_per_sequence"](pairs) == (3 + 8 + 5 + 1) / 4
    assert COUNTS["tokens_per_group"](pairs) == (3 + 5) / 2  # of the first answers
    assert COUNTS["chosen_tokens"](pairs) == (3 + 5) / 2
    assert COUNTS["rejected_tokens"](pairs) == (8 + 1) / 2
    levels = [
        example(1, 1, 1, preference_levels=[1, 2, 2]),
        example(1, 1, preference_levels=[2, 1]),
    ]
    assert COUNTS["pairs_per_sequence"](levels) == (2 + 1) / 5


def test_counts_of_a_step_reach_the_losses_that_take_them():
    # the third: whether the first answer of a list is told by its place
    for name, wanted, order in (
        ("bialign", {"tokens_per_group"}, True),
        ("trpa", {"pairs_per_sequence", "tokens_per_sequence"}, False),
        ("adpa", {"rejected_tokens"}, False),
        ("dckd", {"chosen_tokens", "rejected_tokens"}, False),
        ("grpo", {"tokens_per_sequence"}, False),
    ):
        counts = StepCounts(settings(name), [LOSSES[name]])
        assert counts.supplies(LOSSES[name]) >= wanted and counts.keeps_list_order == order
        counts.begin_step([example(4, 2, preference_levels=[1, 2])], 0.5)
        given = counts.arguments(None, None)
        assert given.keys() == counts.supplies(LOSSES[name])
        assert given.get("tokens_per_group", 4.0) == 4.0
    # a number of the user's stays
    own = settings("grpo", loss_args={"tokens_per_sequence": 7.0})
    assert not StepCounts(own, [LOSSES["grpo"]]).supplies(LOSSES["grpo"])
    assert not any(isinstance(p, StepCounts) for p in plan(settings("dpo"))[1])


def test_lists_keep_their_order_where_the_first_answer_is_another(tmp_path, model):
    data = write_data(tmp_path / "lists.jsonl", "lists")
    stored = prepare(config(tmp_path, model, data, loss=("bialign",), ref_model=model)).examples
    assert all(e.relevance == tuple(range(len(e.relevance))) for e in stored)
    shuffled = prepare(config(tmp_path, model, data, loss=("lipo",))).examples
    assert any(e.relevance != tuple(range(len(e.relevance))) for e in shuffled)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "m")


def test_a_baseline_of_the_users_own_is_used(tmp_path, model):
    """kto: with every log-ratio at 0 a row costs 1 - sigmoid(beta z), or with the sign turned."""
    rows = [{"prompt": f"{i}:", "completion": " a" * (i + 1), "label": True} for i in range(3)]
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = dict(loss=("kto",), max_steps=1)
    computed = train(config(tmp_path / "0", model, str(data), **common))["log_history"][0]
    given = config(tmp_path / "1", model, str(data), loss_args={"kl_baseline": 4.0}, **common)
    own = train(given)["log_history"][0]
    assert computed["loss"] == pytest.approx(0.5)
    assert own["loss"] == pytest.approx(1 - 1 / (1 + np.exp(0.1 * 4.0)), rel=1e-6)


def test_the_hooks_of_a_step_come_in_their_order(tmp_path, model, monkeypatch):
    calls = []
    for name in ("begin_step", "arguments", "learned", "from_statistics", "metrics", "after_step"):
        original = getattr(Columns, name)

        def note(self, *args, name=name, original=original, **options):
            calls.append(name)
            return original(self, *args, **options)

        monkeypatch.setattr(Columns, name, note)
    data = write_data(tmp_path / "d.jsonl", rows=8)
    run = prepare(
        config(
            tmp_path / "out", model, data, max_steps=1, gradient_accumulation_steps=2,
            eval_dataset=data, eval_limit=1,
        )
    )  # fmt: skip
    train_run(run)
    micro = ["arguments", "learned", "metrics"]
    evaluation = ["begin_step", *micro]
    assert calls == [*evaluation, "begin_step", *micro, *micro, "after_step", *evaluation]


def test_a_step_sees_all_its_examples_and_the_share_of_the_run(tmp_path, model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Columns, "begin_step", lambda self, examples, progress: seen.append((examples, progress))
    )
    data = write_data(tmp_path / "d.jsonl", rows=10)
    run = prepare(
        config(
            tmp_path / "out", model, data, max_steps=4, gradient_accumulation_steps=2,
            per_device_train_batch_size=2, eval_dataset=data, eval_steps=2,
            per_device_eval_batch_size=6,
        )
    )  # fmt: skip
    train_run(run)
    assert [p for _, p in seen if p is not None] == [0.0, 0.25, 0.5, 0.75]
    assert [len(e) for e, p in seen if p is not None] == [4, 4, 2, 4]
    assert [len(e) for e, p in seen if p is None] == [10] * 3
    first = [e.row for found, p in seen if p is not None for e in found][:10]
    assert sorted(first) == list(range(1, 11))  # an epoch is every row once


def test_batches_are_dealt_out_with_fillers():
    chunk = [[0], [1], [2], [3], [4]]
    assert list(deal(chunk, 0, 2)) == [([0], True), ([2], True), ([4], True)]
    assert list(deal(chunk, 1, 2)) == [([1], True), ([3], True), ([0], False)]


def test_a_report_without_rows_left_out_says_so():
    assert str(SkipReport(rows=2, kept=2)) == "2 of 2 rows kept, 0 of them truncated, 0 skipped"
