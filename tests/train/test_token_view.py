"""The token view: its numbers are those of the loss, and its files hold them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import torch
from tiny_models import config, save_model, tiny_model, write_data
from tiny_tokenizer import byte_tokenizer

import prefkern
from prefkern.cli import main as cli
from prefkern.integrations.collate import PairCollator
from prefkern.integrations.head_view import shifted
from prefkern.integrations.token_pictures import lines, number, scales_of, write_html, write_png
from prefkern.integrations.token_view import view_pair
from prefkern.objective.token_weights import stage_weights
from prefkern.stats import TokenStats
from prefkern.train.run import prepare
from prefkern.train.token_view import view_example

PAIR = {"prompt": "say <it> ", "chosen": "ab $x$ & d", "rejected": "no\nno"}


@pytest.fixture(scope="module")
def models():
    return tiny_model(), tiny_model(seed=1), byte_tokenizer(pad="<pad>")


def full_logits(models):
    """(log-ratio, KL, targets) each [2, T], from full logits."""
    policy, reference, tokenizer = models
    batch = PairCollator(tokenizer)([PAIR])
    targets = shifted(batch.pop("labels"))
    with torch.no_grad():
        lp, lr = (m(**batch).logits.double().log_softmax(-1) for m in (policy, reference))
    at = targets.clamp(min=0)[..., None]
    return (lp - lr).gather(-1, at)[..., 0], (lr.exp() * (lr - lp)).sum(-1), targets


def values(view, side, name):
    (found,) = (m.values for m in view.answers[side].measures if m.name == name)
    return torch.tensor(found, dtype=torch.float64)


def test_numbers_are_those_of_full_logits(models):
    ratio, kl, targets = full_logits(models)
    view = view_pair(*models, PAIR, loss="tdpo2")
    assert [a.name for a in view.answers] == ["chosen", "rejected"]
    assert [m.name for m in view.answers[0].measures] == ["log-ratio", "KL(ref to policy)"]
    for side in (0, 1):
        scored = targets[side] != -100
        tokens = view.answers[side].tokens
        assert len(tokens) == int(scored.sum())
        close = dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values(view, side, "log-ratio"), ratio[side][scored], **close)
        torch.testing.assert_close(
            values(view, side, "KL(ref to policy)"), kl[side][scored], **close
        )
    assert view.answers[1].tokens == ["n", "o", "\u23ce", "n", "o", "</s>"]


def test_weights_are_the_losses_own(models):
    *_, targets = full_logits(models)
    mask = torch.rand(targets.shape).masked_fill(targets == -100, 0.0)
    options = dict(reward_mask=mask.flatten(), kl_mask=2 * mask.flatten())
    view = view_pair(*models, PAIR, loss="sparsepo", **options)
    for side in (0, 1):
        want = mask[side][targets[side] != -100].double()
        torch.testing.assert_close(values(view, side, "weight of log-ratio"), want)
        torch.testing.assert_close(values(view, side, "weight of KL(ref to policy)"), 2 * want)
    view = view_pair(*models, PAIR, loss="ld_dpo", alpha=0.25)
    assert values(view, 1, "weight").tolist() == [1.0] * 6
    assert values(view, 0, "weight").tolist() == [1.0] * 6 + [0.25] * 5


def test_the_sum_under_the_weights_is_what_the_loss_reads():
    generator = torch.Generator().manual_seed(0)
    logp, ref = -torch.rand(2, 4, 9, generator=generator, dtype=torch.float64)
    targets = torch.ones(4, 9, dtype=torch.long)
    targets[:, :3] = -100
    targets[1, 6:] = -100
    scored = targets != -100
    tokens = TokenStats(logp=logp * scored, ref_logp=ref * scored)
    weights = stage_weights(tokens, targets, loss="ld_dpo", alpha=0.5)["logp"].reshape(4, 9)
    ratio = ((logp - ref) * weights).sum(1)
    want = torch.nn.functional.softplus(-0.1 * (ratio[0::2] - ratio[1::2])).mean()
    got, _ = prefkern.loss_from_stats(tokens, targets, loss="ld_dpo", alpha=0.5, beta=0.1)
    torch.testing.assert_close(got, want)
    own = stage_weights(tokens, targets, loss="dpo", token_weights=2.0 * scored)
    assert torch.equal(own["logp"], 2.0 * scored.flatten()) and len(own) == 1


def test_files(models, tmp_path):
    view = view_pair(*models, PAIR, loss="ld_dpo", title="a & b")
    page = write_html(view, tmp_path / "t.html").read_text()
    assert "a &amp; b" in page and "say &lt;it&gt;" in page and "http" not in page
    for value in values(view, 0, "log-ratio"):
        assert f'title="{value:.6g}"' in page
    first = write_png(view, tmp_path / "t.png").read_bytes()
    assert (
        first.startswith(b"\x89PNG") and write_png(view, tmp_path / "t.png").read_bytes() == first
    )
    (tmp_path / "mine.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not replaced"):
        write_png(view, tmp_path / "mine.png")
    parts = lines(view.answers[0])
    assert [i for part in parts for i in part] == list(range(len(view.answers[0].tokens)))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-1e-9, "0.00"), (-3.14159, "-3.14"), (-31.4159, "-31.4"), (12345.6, "12346")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_colours_tell_signs_and_sizes(models):
    scale = scales_of(view_pair(*models, PAIR, loss="tdpo2"))["log-ratio"]
    assert scale.colour(0.0) == (255, 255, 255)
    low, high = scale.colour(-scale.reach), scale.colour(scale.reach)
    assert low[2] > low[0] and high[0] > high[2]  # blue, orange
    assert sum(scale.colour(scale.reach / 4)) > sum(high)


@pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")
@pytest.mark.parametrize("loss", ["dpo", "sparsepo", "lipo", "kto", "simpo"])
def test_a_row_of_a_run(loss, tmp_path):
    """Any layout, with the run's own providers; without a reference there are log-probabilities."""
    kind = {"lipo": "lists", "kto": "unpaired"}.get(loss, "pairs")
    data = write_data(tmp_path / "rows.jsonl", kind, rows=4)
    model = save_model(tmp_path / "model")
    options = {} if loss == "simpo" else {"ref_model": save_model(tmp_path / "ref", seed=1)}
    run = prepare(config(tmp_path / "out", model, data, loss=(loss,), **options), training=False)
    view = view_example(run, run.examples[1])
    assert len(view.answers) == len(run.examples[1].sequences)
    names = {m.name for a in view.answers for m in a.measures}
    assert ("log-probability" in names) == (loss == "simpo")
    assert ("weight of log-ratio" in names) == (loss == "sparsepo")
    for answer, sequence in zip(view.answers, run.examples[1].sequences, strict=True):
        assert len(answer.tokens) == sequence.length
        assert any(v != 0 for v in answer.measures[0].values)


def test_the_command(tmp_path, capsys):
    data = write_data(tmp_path / "rows.jsonl", rows=3)
    model, ref = save_model(tmp_path / "model"), save_model(tmp_path / "ref", seed=1)
    args = ["view", "--model", model, "--ref-model", ref, "--dataset", data, "--device", "cpu"]
    args += ["--loss", "tdpo2", "--output-dir", str(tmp_path / "out"), "--max-length", "64"]
    assert cli.main([*args, "--row", "2"]) == 0
    written = capsys.readouterr().out.split()
    assert [path.rsplit("/", 1)[1] for path in written] == ["tokens.png", "tokens.html"]
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[2])
    assert row["prompt"] in (tmp_path / "out" / "tokens.html").read_text()
    assert cli.main([*args, "--row", "3"]) == 2
    assert "--row must be in [0, 3)" in capsys.readouterr().err
