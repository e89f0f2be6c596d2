"""Which groups share a batch, and the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence as Items
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from .columns import INTEGERS, batch_columns
from .records import Encoded, Example, PreferenceBatch

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
        seed: Together with `epoch` (from 0) it fixes the order: the same two, the same plan.
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
    if token_budget is not None:
        return _within_budget(examples, order, token_budget)
    assert groups_per_batch is not None
    if groups_per_batch < 1:
        raise ValueError(f"groups_per_batch must be at least 1, got {groups_per_batch}.")
    stop = count - count % groups_per_batch if drop_last else count
    return [order[i : i + groups_per_batch].tolist() for i in range(0, stop, groups_per_batch)]


def _within_budget(examples: Items[Example], order: np.ndarray, budget: int) -> list[list[int]]:
    costs = np.array([example.num_tokens for example in examples], dtype=np.int64)
    largest = int(costs.argmax())
    if costs[largest] > budget:
        raise ValueError(
            f"a group is never split, and row {examples[largest].row} has {costs[largest]} tokens "
            f"over its {len(examples[largest].sequences)} sequences where token_budget is "
            f"{budget}; raise token_budget or lower max_length."
        )
    return [order[a:b].tolist() for a, b in pairwise(plan_in_order(costs[order], budget))]


def plan_in_order(costs: np.ndarray, budget: int) -> list[int]:  # [B+1]
    """Fills each batch while groups fit: 0.13 s for a million groups, once per epoch.

    Args:
        costs: [G] int64, tokens of each group, none above `budget`.
        budget: Most tokens in a batch.

    Returns:
        Boundaries [B+1] of the batches among the groups.
    """
    ends = np.cumsum(costs)
    cu_batches = [0]
    while cu_batches[-1] < len(costs):
        start = cu_batches[-1]
        used = ends[start - 1] if start else 0
        # The last group whose running sum still fits; at least one always does.
        cu_batches.append(int(np.searchsorted(ends, used + budget, side="right")))
    return cu_batches


class _Grid:
    """Where the tokens of each sequence stand in a batch: behind each other, or a row each."""

    def __init__(self, sequences: list[Encoded], packed: bool) -> None:
        self.lengths = np.array([len(seq.input_ids) for seq in sequences])
        if packed:
            self.shape = (1, int(self.lengths.sum()))
            starts = np.concatenate(([0], np.cumsum(self.lengths)[:-1]))
        else:
            self.shape = (len(sequences), int(self.lengths.max()))
            starts = np.arange(len(sequences)) * self.shape[1]
        self.whole = [slice(a, a + n) for a, n in zip(starts, self.lengths, strict=True)]
        # position t predicts the token at t + 1: the scored positions begin one before the response
        self.scored = [
            slice(a.start + seq.completion_start - 1, a.stop - 1)
            for a, seq in zip(self.whole, sequences, strict=True)
        ]

    def fill(self, places: list[slice], parts: Items[Any], rest: Any, dtype: Any) -> torch.Tensor:
        """A tensor of the batch's shape with `parts` at `places` and `rest` elsewhere."""
        flat = np.full(self.shape[0] * self.shape[1], rest, dtype=dtype)
        for place, part in zip(places, parts, strict=True):
            flat[place] = part
        return torch.from_numpy(flat.reshape(self.shape))


def collate(
    examples: Items[Example],
    *,
    packed: bool = True,
    pad_id: int | None = None,
    whole_row: int | None = None,
) -> PreferenceBatch:
    """The tensors of a batch of groups.

    `targets` holds the response shifted by one, and -100 at prompt positions but the last, at the
    last position of each sequence, and in padding.

    Args:
        examples: The groups, at least one, all pairs or all lists or all single answers.
        packed: True: all sequences behind each other, [1, T]. False: right-padded, [S, T].
        pad_id: Id in padded positions; `attention_mask` is 0 there, so any id of the vocabulary
            does, and None, for tokenizers without one, takes 0.
        whole_row: Place in its group of the answer whose prompt `likelihood_targets` score too.
    """
    if not len(examples):
        raise ValueError("collate needs at least one example, got an empty batch.")
    if len({_form(example) for example in examples}) > 1:
        raise ValueError("a batch must hold one layout: all pairs, all lists or all unpaired.")
    sequences = [seq for example in examples for seq in example.sequences]
    sizes = [len(example.sequences) for example in examples]
    grid = _Grid(sequences, packed)
    responses = [seq.input_ids[seq.completion_start :] for seq in sequences]
    targets = grid.fill(grid.scored, responses, IGNORE, np.int64)
    ids = [seq.input_ids for seq in sequences]
    return PreferenceBatch(
        input_ids=grid.fill(grid.whole, ids, 0 if pad_id is None else pad_id, np.int64),
        position_ids=grid.fill(grid.whole, [np.arange(n) for n in grid.lengths], 0, np.int64),
        attention_mask=None if packed else grid.fill(grid.whole, [1] * len(ids), 0, np.int64),
        targets=targets,
        likelihood_targets=_likelihood_targets(grid, targets, sequences, sizes, whole_row),
        cu_seqlens=torch.from_numpy(_boundaries(grid.lengths)) if packed else None,
        cu_groups=torch.from_numpy(_boundaries(sizes)),
        relevance=_per_answer([example.relevance for example in examples], torch.float32),
        desirable=_desirable(examples),
        token_weights=_token_weights(grid, sequences),
        weights=_weights(examples),
        ref_seq_logp=_per_answer([example.ref_seq_logp for example in examples], torch.float64),
        numbers=_numbers(grid, sequences),
        columns=batch_columns([e.columns for e in examples], _boundaries(sizes)[:-1].tolist()),
        inputs=_inputs(grid, sequences, packed),
        rows=[example.row for example in examples],
        num_scored=sum(seq.length for seq in sequences),
        num_tokens=int(grid.lengths.sum()),
    )


def _form(example: Example) -> tuple[bool, bool, bool]:
    return example.relevance is None, example.desirable is None, len(example.sequences) == 1


def _boundaries(sizes: Items[int] | np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)


def _likelihood_targets(
    grid: _Grid,
    targets: torch.Tensor,
    sequences: list[Encoded],
    sizes: list[int],
    whole_row: int | None,
) -> torch.Tensor | None:
    """`targets`, and the prompt's tokens of the answer at `whole_row` of each group."""
    if whole_row is None:
        return None
    wide = targets.clone().flatten()
    roles = [role for size in sizes for role in range(size)]
    for seq, place, role in zip(sequences, grid.whole, roles, strict=True):
        if role == whole_row:
            ids = torch.from_numpy(seq.input_ids[1:].astype(np.int64))
            wide[place.start : place.stop - 1] = ids
    return wide.view_as(targets)


def _per_answer(
    values: list[tuple[float, ...] | None], dtype: torch.dtype
) -> torch.Tensor | None:  # [S]
    """What every group has for each of its answers; None where a group has nothing."""
    given = [value for value in values if value is not None]
    if len(given) < len(values):
        return None
    return torch.tensor([x for value in given for x in value], dtype=dtype)


def _desirable(examples: Items[Example]) -> torch.Tensor | None:  # [S] bool
    if examples[0].desirable is None:
        return None
    return torch.tensor([example.desirable for example in examples], dtype=torch.bool)


def _weights(examples: Items[Example]) -> torch.Tensor | None:  # [G]
    weights = [example.weight for example in examples]
    if all(weight == 1.0 for weight in weights):
        return None
    return torch.tensor(weights, dtype=torch.float32)


def _token_weights(grid: _Grid, sequences: list[Encoded]) -> torch.Tensor | None:
    if all(seq.token_weights is None for seq in sequences):
        return None
    parts = [1.0 if seq.token_weights is None else seq.token_weights for seq in sequences]
    return grid.fill(grid.scored, parts, 0.0, np.float32)


def _numbers(grid: _Grid, sequences: list[Encoded]) -> dict[str, torch.Tensor]:
    found = {}
    for name in sequences[0].numbers:
        dtype = np.int64 if name in INTEGERS else np.float32
        found[name] = grid.fill(grid.scored, [s.numbers[name] for s in sequences], 0, dtype)
    return found


def _inputs(grid: _Grid, sequences: list[Encoded], packed: bool) -> dict[str, torch.Tensor]:
    """Tensors of the pictures, and what goes with every token."""
    if not any(seq.pictures for seq in sequences):
        return {}
    if packed:
        raise ValueError("batches with pictures are padded; use packed=False.")
    along = {
        name: grid.fill(grid.whole, [seq.inputs[name] for seq in sequences], 0, np.int64)
        for name in sequences[0].inputs
    }
    return along | sequences[0].vision.tensors([seq.pictures for seq in sequences])
