"""DPA-RAG's re-ranker (arXiv 2406.18676): pairs, points and a contrast, weighed at every step.

    python examples/dpa_rag_reranker.py --model ENCODER --data passages.jsonl --out DIR

Rows of the data: query, passages (K texts), labels (K numbers, 1 where the reader answers better
with the passage, 0 where worse). An encoder reads query and passage together; of its two class
logits z, pairs compare z_1, points are the cross-entropy, and the contrast draws embeddings of one
label together. The three gradients at the encoder are combined to the point of their convex hull
that is nearest to 0, so that no loss grows.

S passages of a batch of queries, n losses.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefkern.losses import bradley_terry, point_sigmoid
from prefkern.losses.listwise.dpa_rag import sup_con
from prefkern.losses.listwise.more import min_norm_weights


def batch_of(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> tuple[Any, Tensor, Tensor]:
    """Inputs of the encoder, labels [S] and the boundaries of the queries."""
    queries = [row["query"] for row in rows for _ in row["passages"]]
    passages = [passage for row in rows for passage in row["passages"]]
    inputs = tokenizer(queries, passages, padding=True, truncation=True, return_tensors="pt")
    labels = torch.tensor([label for row in rows for label in row["labels"]], dtype=torch.float32)
    sizes = torch.tensor([0, *(len(row["passages"]) for row in rows)])
    return inputs, labels, sizes.cumsum(0).to(torch.int32)


def three_losses(model: Any, inputs: Any, labels: Tensor, cu_groups: Tensor) -> Tensor:  # [3]
    """Mean loss over the queries of the pairs, the points and the contrast."""
    out = model(**inputs, output_hidden_states=True)
    logits, embedding = out.logits.float(), out.hidden_states[-1][:, 0].float()
    pairs = bradley_terry(logits[:, 1], labels, cu_groups)
    points = point_sigmoid(logits[:, 1] - logits[:, 0], labels, cu_groups, beta=1.0)
    return torch.stack([x.mean() for x in (pairs, points, sup_con(embedding, labels, cu_groups))])


def weights_of(losses: Tensor, encoder: torch.nn.Module) -> Tensor:  # [n] -> [n]
    """Weights of the losses whose summed gradient at the encoder is shortest."""
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        parts = zip(found, parameters, strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in parts])
        )
    return min_norm_weights(torch.stack(rows))


def accuracy(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Share of (better, worse) passages of one query that stand in this order."""
    right = total = 0
    with torch.no_grad():
        for row in rows:
            inputs, labels, _ = batch_of(tokenizer, [row])
            score = model(**inputs).logits[:, 1]
            better = labels[:, None] > labels[None, :]
            right += int((better & (score[:, None] > score[None, :])).sum())
            total += int(better.sum())
    return right / total


def train(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], *, queries: int, rate: float,
    epochs: int = 1,
) -> list[list[float]]:  # fmt: skip
    """Trains in place; returns the weights of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    found = []
    for _ in range(epochs):
        for start in range(0, len(rows), queries):
            losses = three_losses(model, *batch_of(tokenizer, rows[start : start + queries]))
            weights = weights_of(losses, model.base_model)
            (weights * losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(weights.tolist())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-5)
    given = parser.parse_args()
    if Path(given.out).exists():
        raise SystemExit(f"{given.out} exists; name a new folder.")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2)
    rows = [json.loads(line) for line in Path(given.data).read_text().splitlines()]
    train(model, tokenizer, rows, queries=given.queries, rate=given.rate)
    print(f"share of passages in order: {accuracy(model, tokenizer, rows):.3f}")
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)


if __name__ == "__main__":
    main()
