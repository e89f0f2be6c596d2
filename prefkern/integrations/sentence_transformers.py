"""Ranking losses for sentence-transformers' CrossEncoderTrainer, without padding.

    from prefkern.integrations.sentence_transformers import RankLoss
    trainer = CrossEncoderTrainer(model=model, train_dataset=rows, loss=RankLoss(model, "softmax"))

Read: 6.2. sentence-transformers' own list losses build [B, L, L] matrices of padded lists; here the
lists stay ragged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..backends import list_options
from ..ops.list_rank import list_rank


class RankLoss(nn.Module):
    """Mean over queries of `list_rank`, or of a listwise loss, of the model's scores.

    Args:
        model: A CrossEncoder with one output.
        family: Of `list_rank`: "pair", "plackett_luce" (the values of their ListMLELoss with
            respect_input_order=False), "softmax" (their ListNetLoss); or a listwise loss of
            `prefkern.LOSSES` by name that reads scores alone: "approx_ndcg", "nca", "lipo" ... with
            that loss's arguments; its beta multiplies the scores and is 1 here. Default "pair".
        activation_fn: Applied to the scores. Default: none.
        mini_batch_size: (query, document) pairs per forward; 0 or less: all at once. Default None:
            the number of queries.
        topk: Of `list_rank`; with a loss by name None.
        backend: As in `list_rank`.
        **options: Of the family or the loss.

    Raises:
        ValueError: an unknown family or option; in a call, labels that do not fit the documents.
    """

    def __init__(
        self,
        model: Any,
        family: str = "pair",
        *,
        activation_fn: nn.Module | None = None,
        mini_batch_size: int | None = None,
        topk: int | None = None,
        backend: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__()
        if family in list_options.FAMILIES:
            list_options.pack(family, options)
        else:
            options = _checked(family, topk, options)
        if getattr(model, "num_labels", 1) != 1:
            raise ValueError(f"RankLoss needs a model with one output, got {model.num_labels}.")
        self.model, self.family, self.options = model, family, options
        self.activation_fn = nn.Identity() if activation_fn is None else activation_fn
        self.mini_batch_size, self.topk, self.backend = mini_batch_size, topk, backend

    def forward(
        self,
        inputs: Sequence[Sequence[Any]],  # queries [B], documents [B] lists
        labels: Sequence[Tensor],  # [B] lists
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        if isinstance(labels, Tensor) or len(inputs) != 2:
            raise ValueError(
                "RankLoss needs two inputs, queries and a list of documents each, and a list of "
                "labels per query: columns query, docs, labels."
            )
        queries, lists = inputs
        sizes = [len(documents) for documents in lists]
        if sizes != [len(own) for own in labels]:
            raise ValueError(
                f"every document needs a label, got {sizes} documents and "
                f"{[len(own) for own in labels]} labels per query."
            )
        rows = [(q, d) for q, documents in zip(queries, lists, strict=True) for d in documents]
        step = self.mini_batch_size or len(queries)
        step = len(rows) if step <= 0 else step
        parts = []
        for start in range(0, len(rows), step):
            tokens = self.model.preprocess(rows[start : start + step], prompt=prompt, task=task)
            device = self.model.device
            tokens = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in tokens.items()}
            parts.append(self.model(tokens)["scores"].view(-1))
        scores = self.activation_fn(torch.cat(parts).float())
        bounds = torch.tensor([0, *sizes], device=scores.device).cumsum(0).int()
        relevance = torch.cat([own.to(scores.device).float() for own in labels])
        if self.family not in list_options.FAMILIES:
            loss = losses.LOSSES[self.family]
            return loss(scores, relevance, bounds, backend=self.backend, **self.options).mean()
        return list_rank(
            scores, relevance, bounds, family=self.family, topk=self.topk, backend=self.backend,
            **self.options,
        ).mean()  # fmt: skip

    def get_config_dict(self) -> dict[str, Any]:
        return {"family": self.family, "topk": self.topk, **self.options}


def _checked(name: str, topk: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a listwise loss of scores alone; another loss is refused."""
    record = losses.LOSSES.get(name)
    if record is None or record.family != "listwise" or losses.required(record):
        raise ValueError(
            f"family must be one of {tuple(list_options.FAMILIES)} or a listwise loss that reads "
            f"scores alone (approx_ndcg, nca, lipo ...), got {name!r}."
        )
    if topk is not None:
        raise ValueError(f"topk is list_rank's, and {name!r} is a loss; leave it out.")
    if "beta" in losses.arguments(record):
        options = {"beta": 1.0, **options}
    losses.bind(record, options)
    return options
