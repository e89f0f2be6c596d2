"""One short run per family of losses on the published samples: the loss falls, nothing is NaN."""

from __future__ import annotations

import math

import pytest
from tiny_models import DATA, STORIES, config

from prefkern.train.loop import train_run
from prefkern.train.run import prepare

pytestmark = pytest.mark.skipif(
    not (DATA.is_dir() and STORIES.is_dir()), reason="no samples or model beside the repository"
)
FILES = {"pairs": "hh_pairs_train", "lists": "ranked_short_train", "unpaired": "unpaired_train"}
RUNS = [
    ("dpo", "pairs", {}),
    ("simpo", "pairs", {}),
    ("orpo", "pairs", {"likelihood_prompt": True}),
    ("dpo", "pairs", {"score_prompt": True}),
    ("beta_dpo", "pairs", {}),
    ("tdpo2", "pairs", {}),
    ("sparsepo", "pairs", {}),
    ("tgdpo", "pairs", {"aux_model": "TEACHER"}),
    ("gkd", "pairs", {"ref_model": "TEACHER"}),
    ("distill", "unpaired", {"ref_model": "TEACHER"}),
    ("kto", "unpaired", {}),
    ("bco", "unpaired", {}),
    ("lipo", "lists", {}),
    ("plackett_luce", "lists", {}),
    ("rrhf", "lists", {}),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Another model of the same vocabulary: the student after a little noise on its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STORIES)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * parameter.data.std() * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("loss", "layout", "options"), RUNS)
def test_loss_falls(tmp_path, teacher, loss, layout, options):
    options = {k: teacher if v == "TEACHER" else v for k, v in options.items()}
    data = str(DATA / f"{FILES[layout]}.jsonl.gz")
    run = prepare(
        config(
            tmp_path, str(STORIES), data, loss=(loss,), eval_dataset=data, limit=4, eval_limit=4,
            max_length=160, max_steps=6, per_device_train_batch_size=4,
            per_device_eval_batch_size=4, learning_rate=5e-4, **options,
        )
    )  # fmt: skip
    rows = train_run(run)["log_history"]
    for row in rows:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float)), row
    start, end = (row for row in rows if "eval_loss" in row)
    assert end["eval_loss"] < start["eval_loss"]
    if layout == "pairs" and loss != "gkd":
        assert 0.0 <= end["eval_rewards/accuracies"] <= 1.0
        assert end["eval_rewards/margins"] > start["eval_rewards/margins"]
    if layout == "lists":
        assert 0.0 <= end["eval_rank/ndcg"] <= 1.0
        assert end["eval_rank/pair_accuracy"] >= start["eval_rank/pair_accuracy"]
