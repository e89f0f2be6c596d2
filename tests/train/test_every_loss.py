"""Every loss of the registry is trained by the trainer, or refused with a reason in one table."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from tiny_models import config, save_model

from prefkern.losses import LOSSES
from prefkern.train import train
from prefkern.train.demands import wanted_layout
from prefkern.train.loop import train_run
from prefkern.train.run import prepare

# What the trainer cannot run, by family or name, and the words of its refusal.
REFUSED = {
    "diffusion": "has no language-model head",
    "more": "is its method only with --head reward",
    "pal": "is its method only with --head reward",
}
# What a step may depend on how it is split: a sort over the batch, a baseline of the batch, a state
# that moves after every micro-batch.
COUPLED = {"aot", "kto", "bco", "beta_dpo", "lcpo", "lcpo_simpo", "lcpo_cpo", "selfie"}
# With the reference at the policy's start the gradient of these is 0.
OTHER_REFERENCE = {"gkd", "distill", "iw_opd", "dckd", "adpa", "bialign", "kl_penalty"}
AUX = {"tgdpo", "adpa"}
STEPPED = {"adpo"}
LAYOUTS = ("pairs", "lists", "unpaired")
TRAINED = [n for n, record in LOSSES.items() if not {n, record.family} & REFUSED.keys()]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save_model(folder / f"m{seed}", seed=seed) for seed in (0, 5, 6)]


def numbers(rng: random.Random, text: str) -> list[float]:
    """One per byte, and one for the end token."""
    return [round(rng.uniform(-3.0, -0.1), 3) for _ in text] + [-0.5]


def row(layout: str, i: int) -> dict:
    """A row with every column that a loss of its layout reads."""
    rng = random.Random(i)
    texts = [f" answer {rng.randint(0, 999)}{k}" for k in range(3)]
    found: dict = {"prompt": f"{i}: go", "rm_margin": rng.uniform(-2, 2), "pref_prob": 0.8}
    found |= {"topk": 1 + i % 2, "annotator": "ann" if i % 2 else None, "judge_logit_gap": 0.3}
    found |= {"score_chosen": 8.0 - i, "score_rejected": 3.0}
    for side in ("chosen", "rejected"):
        found |= {f"slow_{side}_logps": -20.0 + i, f"margin_reward_{side}": [0.5 * i]}
        found[f"source_{side}_mean_logps"] = [-2.0, -1.5 - 0.1 * i]
    answers = {
        "preference_levels": [1 + (i + k) % 3 for k in range(3)],
        "log_target_prob": [-30.0, -25.0, -20.0], "baseline_mean_logps": [-2.0, -3.0, -1.0],
        "reward": [1.0, 0.0, 0.5], "advantages": [0.7, -0.5, 0.1],
        **{name: [numbers(rng, text) for text in texts]
           for name in ("aux_logp", "positive_logp", "negative_logp", "value", "cosine",
                        "oracle_logp", "oracle_ref_logp", "step_reward")},
        "step_index": [[1 + (t > 4) for t in range(len(text) + 1)] for text in texts],
    }  # fmt: skip
    answers["cosine"] = [[x / 3.0 for x in many] for many in answers["cosine"]]
    if layout == "lists":
        found |= {"responses": texts, "scores": [1.0, 0.0, 0.5], **answers}
        return found | {"pairs": [[0, 2], [2, 1]], "pref_prob": [0.9, 0.6]}
    if layout == "unpaired":
        found |= {"completion": texts[0], "label": i % 2 == 0}
        return found | {name: many[0] for name, many in answers.items()}
    roles = ("chosen", "rejected", "gold")
    found |= dict(zip(roles, texts, strict=True)) | {"prompt_cond": f"{i}: gone"}
    for name, many in answers.items():
        found |= {f"{role}_{name}": value for role, value in zip(roles, many, strict=True)}
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for layout in LAYOUTS:
        lines = [json.dumps(row(layout, i)) for i in range(5)]
        (folder / f"{layout}.jsonl").write_text("\n".join(lines) + "\n")
    return {layout: str(folder / f"{layout}.jsonl") for layout in LAYOUTS}


def layout_of(name: str) -> str:
    return wanted_layout(LOSSES[name]) or {"trpa": "lists", "grpo": "lists"}.get(name, "pairs")


def settings(name: str, models, data, folder, **changes):
    options = {
        "loss": (name,), "max_steps": 1, "per_device_train_batch_size": 5, "max_length": 40,
    } | ({"ref_model": models[1]} if name in OTHER_REFERENCE else {})  # fmt: skip
    if name in AUX:
        options["aux_model"] = models[2]
    dataset = data[changes.pop("layout", layout_of(name))]
    if name in STEPPED:
        options["step_size"] = 4
    return config(folder, models[0], dataset, **options | changes)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.filterwarnings("ignore:loss .* is provisional")
def test_one_step_whole_and_in_parts(tmp_path, models, data, name):
    """A step over five packed rows moves the policy; as two padded micro-batches it is the same."""
    held_out = {"eval_dataset": data[layout_of(name)]}
    run = prepare(settings(name, models, data, tmp_path / "whole", **held_out))
    assert run.packed
    before = [p.detach().clone() for p in run.step.policy.parameters()]
    start, whole, end = train_run(run)["log_history"][:3]
    assert math.isfinite(start["eval_loss"]) and math.isfinite(end["eval_loss"])
    assert math.isfinite(whole["loss"]) and 0.0 < whole["grad_norm"] < math.inf
    after = list(run.step.policy.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    if name not in COUPLED:
        split = {
            "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "packing": "off",
        }  # fmt: skip
        parts = train(settings(name, models, data, tmp_path / "parts", **split))["log_history"][0]
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5, abs=1e-7)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(TRAINED)))
def test_refused(tmp_path, name):
    reason = REFUSED.get(name) or REFUSED[LOSSES[name].family]
    with pytest.raises(ValueError, match=reason):
        prepare(config(tmp_path, "no model", "no data", loss=(name,)))
