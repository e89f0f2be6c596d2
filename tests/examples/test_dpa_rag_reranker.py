"""The re-ranker of DPA-RAG on passages whose marker word makes them useful."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from tiny_tokenizer import byte_tokenizer

PATH = Path(__file__).resolve().parents[2] / "examples" / "dpa_rag_reranker.py"
SPEC = importlib.util.spec_from_file_location("dpa_rag_reranker", PATH)
example = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(example)


def rows(seed: int, count: int) -> list[dict]:
    rng = random.Random(seed)

    def passage(label: int) -> str:
        letters = [rng.choice("bcdefgh") for _ in range(7)]
        if label:
            letters[rng.randrange(7)] = "a"
        return "".join(letters)

    labels = (1, 0, 1, 0)
    return [
        {"query": rng.choice("xyz"), "passages": [passage(x) for x in labels], "labels": labels}
        for _ in range(count)
    ]


def test_relevant_passages_come_first():
    import transformers as t

    torch.manual_seed(0)
    settings = t.BertConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=32, num_labels=2, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, tokenizer = t.BertForSequenceClassification(settings), byte_tokenizer(pad="<pad>")
    held_out = rows(1, 16)
    before = example.accuracy(model, tokenizer, held_out)
    weights = example.train(model, tokenizer, rows(0, 48), queries=8, rate=5e-3, epochs=6)
    assert example.accuracy(model, tokenizer, held_out) > max(0.9, before + 0.2)
    assert all(sum(three) == pytest.approx(1.0) and min(three) >= 0.0 for three in weights)
    assert len({round(three[0], 4) for three in weights}) > 2  # anew in every step
