"""Where the reference comes from: refusals, the cache, mismatched rows, activations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import config, save_model, write_data

from prefkern.train import reference_cache, train
from prefkern.train.data import Encoded, Example, collate
from prefkern.train.demands import ReferenceNeeds
from prefkern.train.precompute import precompute
from prefkern.train.reference import choose_mode
from prefkern.train.reference_cache import StoredLogps
from prefkern.train.run import plan, prepare


def options(**changes):
    return config("out", **{"model": "m", "dataset": "d"} | changes)


def needs(loss: str, **loss_args) -> ReferenceNeeds:
    return ReferenceNeeds.of(options(loss=(loss,), loss_args=loss_args))


def mode(loss: str, has_adapter: bool = False, **changes) -> str:
    settings = options(loss=(loss,), **changes)
    _, providers = plan(settings)
    return choose_mode(
        settings, ReferenceNeeds.of(settings), has_adapter=has_adapter,
        moves=any(p.moves_reference for p in providers),
        further=[p.wants_reference for p in providers if p.wants_reference],
    )  # fmt: skip


def test_needs_are_read_off_the_records():
    assert needs("dpo") == ReferenceNeeds(True, False, False, False)
    assert not needs("simpo").any and not needs("grpo", beta=0.0).any
    assert needs("tdpo2").distribution and needs("sparsepo").distribution
    assert needs("ld_dpo").tokens and not needs("ld_dpo").distribution
    assert needs("gkd").teacher and not needs("tdpo2").teacher


def test_modes():
    assert mode("dpo") == "model"
    assert mode("dpo", has_adapter=True) == "adapter"
    assert mode("dpo", has_adapter=True, ref_model="r") == "model"
    assert mode("dpo", has_adapter=True, sync_ref_model=True) == "model"
    assert mode("simpo") == "none"
    assert mode("dpo", precomputed_ref="c") == "cache"


@pytest.mark.parametrize(
    ("changes", "loss", "match"),
    [
        ({"reference": "none"}, "dpo", "needs a reference"),
        ({"reference": "adapter"}, "dpo", "it has none"),
        ({"precomputed_ref": "c"}, "tdpo2", "whole distribution.*precomputed"),
        ({"precomputed_ref": "c"}, "kto", "mismatched completions"),
        ({"precomputed_ref": "c"}, "mapo", "the reference's hidden states"),
        ({"precomputed_ref": "c"}, "sparsepo", "the reference's hidden states"),
        ({"reference": "columns"}, "ld_dpo", "one reference number per token"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(changes, loss, match):
    with pytest.raises(ValueError, match=match):
        mode(loss, **changes)


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
    assert run.reference.rows(batch).seq_logp.tolist() == [-20.0, -21.0] * 3
    train(config(tmp_path / "out", model, str(file), reference="columns"))
    without = config(tmp_path / "out2", model, str(tmp_path / "a.jsonl"), reference="columns")
    with pytest.raises(ValueError, match=f"ref_chosen_logps.*{len(rows)} rows of dataset lack"):
        prepare(without)
    file.write_text(file.read_text() + json.dumps({**rows[0], "prompt": "x"}) + "\n")
    one = config(tmp_path / "out3", model, str(file), reference="columns")
    with pytest.raises(ValueError, match=rf"1 rows of dataset lack them \({len(rows) + 1}\)"):
        prepare(one)  # before a step, whichever it stands in


def unpaired(prompt: list[int], answer: list[int], row: int) -> Example:
    ids = np.array(prompt + answer, dtype=np.int32)
    return Example(row=row, sequences=(Encoded(ids, len(prompt)),), desirable=True)


def test_cache_rows_follow_the_batch():
    rows = [unpaired([1, 2], [3, 4], 0), unpaired([5], [6, 7, 8], 1)]
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])
    one, two = reference_cache.attach(rows, "x", StoredLogps(logp, torch.tensor([0, 2, 5])))
    found = collate([two, one], packed=True).numbers["x"]
    assert found[0].tolist() == [-3.0, -4.0, -5.0, 0.0, 0.0, -1.0, -2.0, 0.0]
    with pytest.raises(ValueError, match="3 numbers for an answer of row 0 with 2 scored"):
        reference_cache.attach(rows, "x", StoredLogps(logp, torch.tensor([0, 3, 5])))
    with pytest.raises(ValueError, match="holds 1 sequences, the data 2"):
        reference_cache.attach(rows, "x", StoredLogps(logp, torch.tensor([0, 5])))


def test_which_cache_of_a_folder_is_of_these_rows(tmp_path):
    example = Example(row=0, sequences=(Encoded(np.arange(5, dtype=np.int32), 2),))
    other = Example(row=0, sequences=(Encoded(np.arange(1, 7, dtype=np.int32), 2),))
    about = {"format": reference_cache.FORMAT, "rows": reference_cache.rows_key([example])}
    tensors = {"logp": torch.zeros(3), "cu_seqlens": torch.tensor([0, 3])}

    def write(name, of):
        data = {"data": reference_cache.data_hash([of])}
        save_file(tensors, tmp_path / f"ref_logps-{name}.safetensors", about | data)

    write("one", other)  # the same rows under another tokenizer
    with pytest.raises(ValueError, match="computed for other tokens than this data set"):
        reference_cache.find(tmp_path, [example], same_tokens=True)
    assert reference_cache.find(tmp_path, [example], same_tokens=False).logp.tolist() == [0, 0, 0]
    write("two", example)
    assert reference_cache.find(tmp_path, [example], same_tokens=True).logp.tolist() == [0, 0, 0]
    write("three", example)
    with pytest.raises(ValueError, match="several caches of these rows"):
        reference_cache.find(tmp_path, [example], same_tokens=True)
