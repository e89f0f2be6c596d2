"""The second frozen model: who needs it, where it comes from, and what fits beside the policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import config, save_model, tiny_model, write_data

from prefkern.integrations.head import at_head
from prefkern.train.recipes.aux_model import AuxModel
from prefkern.train.reference import token_logps
from prefkern.train.run import plan, prepare


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aux")
    model, aux = save_model(folder / "model"), save_model(folder / "aux", seed=5)
    return model, write_data(folder / "pairs.jsonl"), aux


@pytest.mark.parametrize(
    ("loss", "options", "match"),
    [
        ("tgdpo", {}, r"pass --aux-model \(or columns, --column aux_logp=NAME\)"),
        ("adpa", {"ref_model": "m"}, r"pass --aux-model\.$"),
        ("adpa", {"ref_model": "m", "precomputed_aux": "c"}, r"pass --aux-model\.$"),
        ("dpo", {"aux_model": "m"}, "loss dpo reads no second frozen model"),
        ("dpo", {"precomputed_aux": "m"}, "loss dpo reads no second frozen model"),
        ("tgdpo", {"aux_model": "m", "columns": {"aux_logp": "a"}}, "a column gives what"),
    ],
)
def test_who_needs_one(loss, options, match):
    with pytest.raises(ValueError, match=match):
        plan(config("o", "m", "d", loss=(loss,), **options))


def test_a_column_takes_its_place():
    _, providers = plan(config("o", "m", "d", loss=("tgdpo",), columns={"aux_logp": "a"}))
    assert not any(isinstance(p, AuxModel) for p in providers)


def test_its_log_probabilities_are_its_own(tmp_path, materials):
    model, data, aux = materials
    run = prepare(config(tmp_path, model, data, loss=("tgdpo",), aux_model=aux))
    micro = run.micro_batch(run.examples[:3])
    _, given = run.constants(micro)
    other = tiny_model(seed=5)
    at_head(other)
    want = token_logps(other, micro.batch, run.config)
    assert torch.allclose(given["aux_logp"], want.flatten(), atol=1e-5)
    own = token_logps(run.step.policy, micro.batch, run.config).flatten()
    assert not torch.allclose(given["aux_logp"], own, atol=1e-2)


def test_token_rewards_need_a_reference_to_be_compared_with(tmp_path, materials):
    model, data, aux = materials
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    file = tmp_path / "columns.jsonl"
    more = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    file.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
    with pytest.raises(ValueError, match="one reference number per token"):
        prepare(
            config(tmp_path, model, str(file), loss=("tgdpo",), aux_model=aux, reference="columns")
        )


def test_a_distribution_is_read_with_the_references_scale(tmp_path, materials):
    _, data, _ = materials
    plain = save_model(tmp_path / "plain", "granite")
    other = save_model(tmp_path / "other", "granite", seed=3, logits_scaling=2.0)
    options = dict(loss=("adpa",), ref_model=plain)
    with pytest.raises(ValueError, match="must agree in them"):
        prepare(config(tmp_path / "o", plain, data, aux_model=other, **options))
    run = prepare(config(tmp_path / "o", plain, data, aux_model=plain, **options))
    _, given = run.constants(run.micro_batch(run.examples[:2]))
    with given["aux"].gathered() as head:
        assert head.scale == pytest.approx(0.25) and not head.requires_grad
