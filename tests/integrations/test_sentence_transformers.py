"""RankLoss against sentence-transformers' own list losses, and under its trainer."""

from __future__ import annotations

import inspect

import pytest

library = pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")

import torch  # noqa: E402
import trl_runs as runs  # noqa: E402
from datasets import Dataset  # noqa: E402
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer  # noqa: E402
from sentence_transformers.cross_encoder import losses as theirs  # noqa: E402
from sentence_transformers.cross_encoder.training_args import (  # noqa: E402
    CrossEncoderTrainingArguments,
)

from prefkern.integrations.sentence_transformers import RankLoss  # noqa: E402

QUERIES = ["a b", "c", "d e"]
DOCS = [["a", "b c", "d"], ["e f g", "h"], ["a b c", "d", "e", "f g"]]
LABELS = [[2.0, 0.0, 1.0], [0.0, 3.0], [1.0, 2.0, 0.5, 4.0]]


@pytest.fixture
def model(tmp_path):
    import transformers as t

    config = t.BertConfig(
        vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    t.BertForSequenceClassification(config).save_pretrained(tmp_path)
    runs.tokenizer().save_pretrained(tmp_path)
    return CrossEncoder(str(tmp_path), device="cpu", max_length=48).eval()


def result(loss, model):
    model.zero_grad()
    value = loss([QUERIES, DOCS], [torch.tensor(own) for own in LABELS])
    value.backward()
    return value.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("size", [None, 2, -1])
@pytest.mark.parametrize("family", ["softmax", "plackett_luce"])
def test_equals_the_librarys_own(model, family, size):
    own = {
        "softmax": lambda: theirs.ListNetLoss(model, mini_batch_size=size),
        "plackett_luce": lambda: theirs.ListMLELoss(
            model, respect_input_order=False, mini_batch_size=size
        ),
    }[family]()
    want, grads = result(own, model)
    got, mine = result(RankLoss(model, family, mini_batch_size=size), model)
    assert got == pytest.approx(want, rel=1e-5)
    assert grads.keys() == mine.keys() and len(grads) > 10
    for name, grad in grads.items():
        assert torch.allclose(mine[name], grad, rtol=1e-3, atol=1e-5), name


def test_its_call_is_the_librarys():
    a, b = (inspect.signature(c.forward).parameters for c in (RankLoss, theirs.ListNetLoss))
    assert list(a) == list(b)


@pytest.mark.parametrize("family", ["pair", "approx_ndcg"])
def test_trains_under_its_trainer(model, tmp_path, family):
    loss = RankLoss(model, family)
    before, _ = result(loss, model)
    rows = Dataset.from_dict({"query": QUERIES, "docs": DOCS, "labels": LABELS})
    trainer = CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(
            str(tmp_path / "run"), max_steps=30, learning_rate=3e-4, logging_steps=1, use_cpu=True,
            report_to=[], save_strategy="no", per_device_train_batch_size=3, disable_tqdm=True,
        ),
        train_dataset=rows,
        loss=loss,
    )  # fmt: skip
    trainer.train()
    assert sum("loss" in row for row in trainer.state.log_history) == 30
    after, _ = result(loss, model.eval())
    assert after < before - 0.02


def test_refused(model):
    with pytest.raises(ValueError, match="family must be one of"):
        RankLoss(model, "ranknet")
    with pytest.raises(ValueError, match="takes the options"):
        RankLoss(model, "softmax", margin=1.0)
    made = RankLoss(model)
    with pytest.raises(ValueError, match="columns query, docs, labels"):
        made([QUERIES, DOCS], torch.zeros(3))
    with pytest.raises(ValueError, match="every document needs a label"):
        made([QUERIES, DOCS], [torch.zeros(1)] * 3)
