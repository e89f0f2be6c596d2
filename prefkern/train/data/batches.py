"""Which groups share a batch, and the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ...cli.env_report import host_module
from .extra import batch_extras
from .records import Example, PreferenceBatch

IGNORE = -100


def plan_batches(
    examples: Items[Example],
    *,
    seed: int,
    epoch: int = 0,
    groups_per_batch: int | None = None,
    token_budget: int | None = None,
    packing: bool = True,
    shuffle: bool = True,
    drop_last: bool = False,
) -> list[list[int]]:
    """Indices of the examples of every batch of one epoch; each example is in exactly one.

    Args:
        examples: The data set.
        seed: Together with `epoch` it fixes the order; the same two give the same plan.
        epoch: From 0.
        groups_per_batch: Groups in a batch. Give this or `token_budget`.
        token_budget: Most tokens, prompts included, in a packed batch. Groups are taken in the
            shuffled order while they fit and never split. In that order, and not largest first,
            because that would put the same long answers together in every epoch.
        packing: Whether `collate` will pack; only checked against `token_budget`.
        shuffle: False keeps the order of the data.
        drop_last: Leave out the last batch where it has fewer groups (`groups_per_batch` only).

    Raises:
        ValueError: No examples, not exactly one size, or a group larger than `token_budget`.
    """
    if not len(examples):
        raise ValueError("plan_batches needs at least one example, got none.")
    if (groups_per_batch is None) == (token_budget is None):
        raise ValueError(
            "give exactly one of groups_per_batch and token_budget, got "
            f"{groups_per_batch} and {token_budget}."
        )
    if token_budget is not None and not packing:
        raise ValueError("token_budget counts packed tokens; padded batches need groups_per_batch.")
    count = len(examples)
    order = np.arange(count)
    if shuffle:
        order = np.random.default_rng([seed, epoch]).permutation(count)
    if groups_per_batch is not None:
        if groups_per_batch < 1:
            raise ValueError(f"groups_per_batch must be at least 1, got {groups_per_batch}.")
        stop = count - count % groups_per_batch if drop_last else count
        return [order[i : i + groups_per_batch].tolist() for i in range(0, stop, groups_per_batch)]
    assert token_budget is not None
    costs = np.array([example.num_tokens for example in examples], dtype=np.int64)
    largest = int(costs.argmax())
    if costs[largest] > token_budget:
        raise ValueError(
            f"a group is never split, and row {examples[largest].row} has {costs[largest]} tokens "
            f"over its {len(examples[largest].sequences)} sequences where token_budget is "
            f"{token_budget}; raise token_budget or lower max_length."
        )
    native, _ = host_module()
    if native is None:  # built without a compiler; the twin gives the same plans
        groups, cu_batches = plan_in_order(costs[order], token_budget)
    else:
        groups, cu_batches = native.plan_batches(costs[order], token_budget, method="in_order")
    return [order[groups[a:b]].tolist() for a, b in pairwise(cu_batches)]


def plan_in_order(costs: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Twin of `prefkern._C.plan_batches(method="in_order")`: fill each batch while groups fit.

    Args:
        costs: [G] int64, tokens of each group, none above `budget`.
        budget: Most tokens in a batch.

    Returns:
        (groups [G], cu_batches [B+1]): batch b is groups[cu_batches[b]:cu_batches[b+1]].
    """
    ends = np.cumsum(costs)
    cu_batches = [0]
    while cu_batches[-1] < len(costs):
        start = cu_batches[-1]
        used = ends[start - 1] if start else 0
        # The last group whose running sum still fits; at least one always does.
        cu_batches.append(int(np.searchsorted(ends, used + budget, side="right")))
    return np.arange(len(costs)), np.array(cu_batches, dtype=np.int64)


def collate(
    examples: Items[Example],
    *,
    packed: bool = True,
    pad_id: int | None = None,
    whole_row: int | None = None,
) -> PreferenceBatch:
    """The tensors of a batch of groups.

    Position t predicts the token at t + 1 of its own sequence, so `targets` holds the response
    shifted by one, and -100 at prompt positions but the last, at the last position of each
    sequence, and in padding.

    Args:
        examples: The groups, at least one, all pairs or all lists or all unpaired.
        packed: True: all sequences behind each other, [1, T]. False: right-padded, [S, T].
        pad_id: Id in padded positions; `attention_mask` is 0 there, so any id of the vocabulary
            does, and None, for tokenizers without one, takes 0.
        whole_row: Place in its group of the answer whose prompt `likelihood_targets` score too.
    """
    if not len(examples):
        raise ValueError("collate needs at least one example, got an empty batch.")
    sequences = [seq for example in examples for seq in example.sequences]
    sizes = [len(example.sequences) for example in examples]
    kinds = {
        (example.labels is None, size == 1) for example, size in zip(examples, sizes, strict=True)
    }
    if len(kinds) > 1:
        raise ValueError("a batch must hold one layout: all pairs, all lists or all unpaired.")
    lengths = np.array([len(seq.input_ids) for seq in sequences])
    shape = (1, int(lengths.sum())) if packed else (len(sequences), int(lengths.max()))
    starts = (
        np.concatenate(([0], np.cumsum(lengths)[:-1]))
        if packed
        else (np.arange(len(sequences)) * shape[1])
    )
    input_ids = np.full(shape[0] * shape[1], 0 if pad_id is None else pad_id, dtype=np.int64)
    position_ids = np.zeros_like(input_ids)
    targets = np.full_like(input_ids, IGNORE)
    group_weights = [example.weight for example in examples]
    alike = all(weight == 1.0 for weight in group_weights)
    token_weights = None
    if any(seq.token_weights is not None for seq in sequences):
        token_weights = np.zeros(input_ids.shape, dtype=np.float32)
    spans = []
    roles = [role for size in sizes for role in range(size)]
    for seq, start, length in zip(sequences, starts, lengths, strict=True):
        input_ids[start : start + length] = seq.input_ids
        position_ids[start : start + length] = np.arange(length)
        scored = slice(start + seq.completion_start - 1, start + length - 1)
        spans.append((scored.start, scored.stop))
        targets[scored] = seq.input_ids[seq.completion_start :]
        if token_weights is not None:
            token_weights[scored] = 1.0 if seq.token_weights is None else seq.token_weights

    whole = None
    if whole_row is not None:
        whole = targets.copy()
        for seq, start, role in zip(sequences, starts, roles, strict=True):
            if role == whole_row:
                whole[start : start + len(seq.input_ids) - 1] = seq.input_ids[1:]

    def tensor(flat: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(flat.reshape(shape))

    attention_mask = None
    if not packed:
        attention_mask = torch.from_numpy(
            (np.arange(shape[1])[None, :] < lengths[:, None]).astype(np.int64)
        )
    return PreferenceBatch(
        input_ids=tensor(input_ids),
        position_ids=tensor(position_ids),
        attention_mask=attention_mask,
        targets=tensor(targets),
        cu_seqlens=_boundaries(lengths) if packed else None,
        cu_groups=_boundaries(sizes),
        labels=_labels(examples),
        token_weights=None if token_weights is None else tensor(token_weights),
        weights=None if alike else torch.tensor(group_weights, dtype=torch.float32),
        ref_seq_logp=_ref_seq_logp(examples),
        rows=[example.row for example in examples],
        num_scored=int((targets != IGNORE).sum()),
        num_tokens=int(lengths.sum()),
        values=_values(examples, sizes, spans, shape),
        likelihood_targets=None if whole is None else tensor(whole),
    )


def _boundaries(sizes: Items[int] | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(sizes))).astype(np.int32))


def _labels(examples: Items[Example]) -> torch.Tensor | None:
    if examples[0].labels is None:
        return None
    labels = [label for example in examples for label in example.labels or ()]
    unpaired = len(examples[0].sequences) == 1
    return (
        torch.tensor(labels, dtype=torch.float32) > 0
        if unpaired
        else torch.tensor(labels, dtype=torch.float32)
    )


def _values(
    examples: Items[Example], sizes: list[int], spans: list[tuple[int, int]], shape: tuple[int, int]
) -> dict[str, Any]:
    rows = [example.values for example in examples if example.values]
    if not rows:
        return {}
    first = [0, *np.cumsum(sizes)[:-1].tolist()]
    return batch_extras(rows, first, spans, shape)


def _ref_seq_logp(examples: Items[Example]) -> torch.Tensor | None:
    """[S] fp64 where every pair brings its reference log-probabilities, else None."""
    values = []
    for example in examples:
        if not example.extra:
            return None
        values += [example.extra["ref_chosen_logps"], example.extra["ref_rejected_logps"]]
    return torch.tensor(values, dtype=torch.float64)
