"""Log-probabilities of further models: InfiFPO's fused reference, a DPO model as token rewards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import config, save_model, tiny_model, write_data
from tiny_tokenizer import byte_tokenizer

from prefkern.losses.pairwise.infifpo import fused_reference
from prefkern.train import models, reference_cache, train
from prefkern.train.precompute import precompute
from prefkern.train.recipes.aux_model import with_token_rewards
from prefkern.train.recipes.fused_reference import with_sources
from prefkern.train.run import prepare


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    """(folder, model, pairs, held-out pairs)"""
    folder = tmp_path_factory.mktemp("fuse")
    model = save_model(folder / "model")
    return (
        folder,
        model,
        write_data(folder / "a.jsonl"),
        write_data(folder / "b.jsonl", rows=7, seed=5),
    )


@pytest.fixture(scope="module")
def sources(materials):
    """Caches of two other models; the second has a tokenizer, and so token counts, of its own."""
    folder, _, data, held_out = materials
    first = save_model(folder / "first", seed=1)
    second = folder / "second"
    tiny_model(seed=2, vocab_size=262).save_pretrained(second)
    byte_tokenizer(merges=(("a", "b"), ("c", "d"))).save_pretrained(second)
    for name in (first, str(second)):
        precompute(config(f"{name}-cache", name, data, eval_dataset=held_out))
    return f"{first}-cache", f"{second}-cache"


def losses(result) -> list[float]:
    return [row["loss"] for row in result["log_history"] if "loss" in row]


def test_a_fused_reference_of_two_models(tmp_path, materials, sources):
    _, model, data, held_out = materials
    settings = config(
        tmp_path, model, data, loss=("infifpo",), fused_ref=sources, eval_dataset=held_out,
        max_steps=4, per_device_train_batch_size=12, num_rounds=2,
    )  # fmt: skip
    result = train(settings)
    own = prepare(config(tmp_path / "own", model, data))
    caches = [
        reference_cache.find(path, own.examples, same_tokens=False)
        for path in (*sources, str(precompute(config(tmp_path / "ref", model, data))[0]))
    ]
    means = torch.stack([reference_cache.mean_logps(cache) for cache in caches], 1).view(12, 2, 3)
    # the second source merges letters: fewer tokens, and still one mean per answer
    assert caches[1].cu_seqlens[-1] < caches[0].cu_seqlens[-1]
    fused = [
        fused_reference(means[:, side, 2], means[:, side, :2], name)
        for side, name in enumerate(("chosen", "rejected"))
    ]
    assert (fused[0] > means[:, 0, 2]).any() and (fused[1] < means[:, 1, 2]).any()
    # at the first step the policy is the pivot; one batch holds all pairs
    margin = 2.5 * ((means[:, 0, 2] - fused[0]) - (means[:, 1, 2] - fused[1]))
    expected = torch.nn.functional.softplus(-margin).mean().item()
    found = losses(result)
    assert found[0] == pytest.approx(expected, rel=1e-4)
    assert found[0] > math.log(2) and found[-1] < found[0] and len(found) == 8
    assert all("eval_loss" in row for row in result["log_history"] if row["step"] == 0)


def test_caches_that_do_not_belong_are_refused(tmp_path, materials, sources):
    _, model, data, _ = materials
    more = write_data(tmp_path / "more.jsonl", rows=9)
    as_many = write_data(tmp_path / "as_many.jsonl", seed=9)
    options = dict(loss=("infifpo",))
    for changes, match in (
        (dict(dataset=more, fused_ref=sources), "computed for other rows"),
        (dict(dataset=as_many, fused_ref=sources), "computed for other rows"),
        (dict(dataset=data, fused_ref=(str(tmp_path / "none"),)), "prefkern precompute"),
        (dict(dataset=data), "missing.*source_chosen_mean_logps"),
    ):
        settings = config(tmp_path, model, **changes | options)
        with pytest.raises(ValueError, match=match):
            prepare(settings)
    lists = write_data(tmp_path / "lists.jsonl", "lists")
    with pytest.raises(ValueError, match=r"not pairs|are lists"):
        prepare(config(tmp_path, model, lists, fused_ref=sources, **options))
    with pytest.raises(ValueError, match=r"reference of loss infifpo, got \['dpo'\]"):
        prepare(config(tmp_path, model, data, fused_ref=sources))


def test_a_cache_that_is_not_finite_names_its_row(tmp_path, materials, sources):
    _, model, data, _ = materials
    examples = prepare(config(tmp_path, model, data)).examples
    for file in Path(sources[0]).glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            about = stored.metadata()
        last_of_row_4 = tensors["cu_seqlens"][2 * 4] - 1  # two answers a row
        tensors["logp"][last_of_row_4] = -math.inf
        save_file(tensors, tmp_path / file.name, about)
    for paths in ([tmp_path], [sources[1], tmp_path]):
        with pytest.raises(ValueError, match="log-probabilities of row 4 are not finite"):
            with_sources(examples, paths)


def test_a_dpo_model_gives_token_rewards(tmp_path, materials):
    """From a checkpoint to tgdpo's weights: as a model, as a cache, and as columns of the data."""
    _, model, data, held_out = materials
    train(config(tmp_path / "dpo", model, data, max_steps=6, learning_rate=3e-3))
    aux = str(tmp_path / "dpo")
    precompute(config(tmp_path / "cache", aux, data, eval_dataset=held_out))
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    settings = config(tmp_path, aux, data)
    rows = with_token_rewards(
        rows, models.load_model(aux, settings).eval(), models.load_tokenizer(aux), settings
    )
    columns = tmp_path / "columns.jsonl"
    columns.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, dataset=data, **options):
        return losses(
            train(
                config(
                    tmp_path / name, model, dataset, loss=("tgdpo",), max_steps=3,
                    loss_args={"alpha": 5.0}, **options,
                )
            )
        )  # fmt: skip

    live = run("live", aux_model=aux, eval_dataset=held_out)
    cached = run("cached", precomputed_aux=str(tmp_path / "cache"), eval_dataset=held_out)
    from_columns = run("columns", str(columns), columns={"aux_logp": "aux_logp"})
    assert cached == pytest.approx(live, abs=1e-6)
    assert from_columns == pytest.approx(live, abs=1e-6)
    # and they weigh: a guiding model equal to the reference gives dpo
    plain = run("plain", aux_model=model)
    assert plain != pytest.approx(live, abs=1e-4)
    with pytest.raises(ValueError, match="one of the two"):
        config(tmp_path, model, data, aux_model=aux, precomputed_aux="c")
    with pytest.raises(ValueError, match="other tokens"):
        run(
            "other",
            write_data(tmp_path / "o.jsonl", seed=9),
            precomputed_aux=str(tmp_path / "cache"),
        )
