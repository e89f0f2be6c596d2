"""Where the reference comes from: refusals, the cache, mismatched rows, activations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import config, save_model, tiny_model, write_data

from prefkern.integrations import hf
from prefkern.train import activations, reference_cache
from prefkern.train.data import Example, Sequence, collate
from prefkern.train.loop import train
from prefkern.train.precompute import precompute
from prefkern.train.reference import Needs, Reference, baseline_from, choose_mode, mismatch
from prefkern.train.run import prepare


def needs(loss: str, **loss_args) -> Needs:
    return Needs.of((loss,), loss_args)


def test_needs_are_read_off_the_records():
    assert needs("dpo") == Needs(True, False, False, False, False, False, False)
    assert not needs("simpo").reference
    assert needs("tdpo2").distribution
    assert needs("sparsepo").masks and needs("sparsepo").distribution
    assert needs("mapo").activations and needs("tgdpo").aux and needs("kto").kl_baseline
    assert needs("ld_dpo").tokens and not needs("ld_dpo").distribution


def options(**changes):
    return config("out", **{"model": "m", "dataset": "d"} | changes)


def test_modes():
    assert choose_mode(options(), needs("dpo"), has_adapter=False) == "model"
    assert choose_mode(options(), needs("dpo"), has_adapter=True) == "adapter"
    assert choose_mode(options(ref_model="r"), needs("dpo"), has_adapter=True) == "model"
    assert choose_mode(options(), needs("simpo"), has_adapter=False) == "none"
    assert choose_mode(options(precomputed_ref="c"), needs("dpo"), has_adapter=False) == "cache"


@pytest.mark.parametrize(
    ("changes", "loss", "match"),
    [
        ({"reference": "none"}, "dpo", "needs a reference"),
        ({"reference": "adapter"}, "dpo", "it has none"),
        ({"precomputed_ref": "c"}, "tdpo2", "whole distribution.*precomputed"),
        ({"precomputed_ref": "c"}, "kto", "mismatched completions"),
        ({"reference": "columns"}, "ld_dpo", "one reference number per token"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(changes, loss, match):
    with pytest.raises(ValueError, match=match):
        choose_mode(options(loss=(loss,), **changes), needs(loss), has_adapter=False)


def test_precomputed_log_probabilities_train_like_the_model(tmp_path):
    model = save_model(tmp_path / "model")
    data = write_data(tmp_path / "pairs.jsonl")
    common = dict(loss=("dpo",), eval_dataset=data, seed=3)
    paths = precompute(config(tmp_path / "cache", model, data, eval_dataset=data))
    assert all(p.name.startswith("ref_logps-") and p.suffix == ".safetensors" for p in paths)
    live = train(config(tmp_path / "live", model, data, **common))["log_history"]
    cached = train(
        config(tmp_path / "cached", model, data, precomputed_ref=str(tmp_path / "cache"), **common)
    )["log_history"]
    for a, b in zip(live, cached, strict=True):
        for name in ("loss", "rewards/margins", "eval_loss"):
            if name in a:
                assert a[name] == pytest.approx(b[name], abs=1e-5)


def test_a_cache_of_other_data_weights_or_precision_is_refused(tmp_path):
    model, other = save_model(tmp_path / "model"), save_model(tmp_path / "other", seed=1)
    data, more = write_data(tmp_path / "a.jsonl"), write_data(tmp_path / "b.jsonl", rows=11)
    (file,) = precompute(config(tmp_path / "cache", model, data))
    for changes, match in (
        ({"dataset": more}, "other data"),
        ({"model": other}, "other weights"),
        ({"bf16": True}, "other compute"),
    ):
        run = options(**{"model": model, "dataset": data, "precomputed_ref": str(file)} | changes)
        with pytest.raises(ValueError, match=match):
            prepare(run)
    with pytest.raises(ValueError, match=r"does not exist.*precompute"):
        prepare(options(model=other, dataset=data, precomputed_ref=str(tmp_path / "cache")))


def test_reference_columns(tmp_path):
    model = save_model(tmp_path / "model")
    text = Path(write_data(tmp_path / "a.jsonl")).read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    file = tmp_path / "columns.jsonl"
    lines = [{**row, "ref_chosen_logps": -20.0, "ref_rejected_logps": -21.0} for row in rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = prepare(config(tmp_path / "out", model, str(file), reference="columns"))
    batch = collate(run.examples[:3], packed=True)
    assert run.reference.rows(batch, range(3)).seq_logp.tolist() == [-20.0, -21.0] * 3
    train(config(tmp_path / "out", model, str(file), reference="columns"))
    without = config(tmp_path / "out2", model, str(tmp_path / "a.jsonl"), reference="columns")
    with pytest.raises(ValueError, match="ref_chosen_logps"):
        train(without)


def unpaired(prompt: list[int], answer: list[int], row: int) -> Example:
    ids = np.array(prompt + answer, dtype=np.int32)
    return Example(row=row, sequences=(Sequence(ids, len(prompt)),), labels=(1.0,))


def test_mismatched_completions_rotate_by_one():
    rows = [unpaired([1, 2], [3], 0), unpaired([4], [5, 6, 7], 1), unpaired([8], [9], 2)]
    made = mismatch(rows, 4)
    assert [e.sequences[0].input_ids.tolist() for e in made] == [[1, 2, 9], [4, 3], [8, 5, 6, 7]]
    assert [e.sequences[0].completion_start for e in made] == [2, 1, 1]


@pytest.mark.parametrize("packed", [True, False])
def test_mismatched_logratio_against_full_logits(packed):
    policy, other = tiny_model("llama", 0), tiny_model("llama", 1)
    rows = [
        unpaired([1, 2, 3], [4, 5], 0),
        unpaired([6, 7], [8, 9, 10], 1),
        unpaired([11], [12], 2),
    ]
    reference = Reference("model", needs("kto"), options(), policy=policy, model=other)
    found = reference.mismatched_logratio(rows, packed=packed, pad_id=0, device=torch.device("cpu"))

    def logp(model, ids, start):
        with torch.no_grad():
            table = model(torch.tensor([ids.tolist()])).logits[0].log_softmax(-1)
        return sum(table[i - 1, ids[i]].item() for i in range(start, len(ids)))

    want = [
        logp(policy, s.input_ids, s.completion_start) - logp(other, s.input_ids, s.completion_start)
        for s in (e.sequences[0] for e in mismatch(rows, 64))
    ]
    assert found.tolist() == pytest.approx(want, abs=1e-4)
    assert baseline_from(torch.tensor(-3.0)).item() == 0.0
    assert baseline_from(torch.tensor(2.5)).item() == 2.5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activations_are_feature_means_of_every_place(family):
    model = tiny_model(family)
    ids = torch.randint(200, (2, 7))

    def hooks() -> int:  # transformers keeps hooks of its own after the first such forward
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    hf.hidden_states(model, ids, position_ids=None, attention_mask=None, layers=True)
    before = hooks()
    with torch.no_grad(), activations.record(model, True) as recorder:
        _, states = hf.hidden_states(
            model, ids, position_ids=None, attention_mask=None, layers=True
        )
    found = recorder.collect(states, torch.zeros(2, 7))
    counts = torch.bincount(found["hook_type"], minlength=4).tolist()
    # 2 blocks: an MLP each; query, key, value, output each; the embedding and every block; logits
    assert counts == [2, 8, 3, 1]
    assert found["activations"].shape == (14, 14)
    residual = found["activations"][found["hook_type"] == activations.RESIDUAL]
    assert torch.allclose(residual[1:], states.mean(-1).flatten(1))
    assert hooks() == before


def test_models_without_known_layers_are_refused():
    model = tiny_model("llama")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        for layer in model.model.layers:
            setattr(layer.self_attn, "x" + name, layer.self_attn._modules.pop(name))
    for layer in model.model.layers:
        layer.mlp.xdown = layer.mlp._modules.pop("down_proj")
    with pytest.raises(ValueError, match="mapo's mask"), activations.record(model, True):
        pass


def test_cache_rows_follow_the_batch():
    rows = [unpaired([1, 2], [3, 4], 0), unpaired([5], [6, 7, 8], 1)]
    cache = reference_cache.ReferenceCache(
        torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]), torch.tensor([0, 2, 5]), rows
    )
    batch = collate([rows[1], rows[0]], packed=True)
    found = cache.token_logps([1, 0], batch.targets)
    assert found[0].tolist() == [-3.0, -4.0, -5.0, 0.0, 0.0, -1.0, -2.0, 0.0]
    with pytest.raises(ValueError, match="scored"):
        cache.token_logps([0], batch.targets)
