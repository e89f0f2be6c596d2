"""Plans and batches: groups stay whole, the order is the seed's, rows say what they predict."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import byte_tokenizer

from prefkern.train.data import IGNORE, Loader, collate, plan_batches, plan_in_order

TOKENIZER = byte_tokenizer()


def pairs(count, seed=0, **extra):
    rng = np.random.default_rng(seed)
    rows = [
        {
            "prompt": "p" * int(rng.integers(1, 9)),
            "chosen": "c" * int(rng.integers(1, 30)),
            "rejected": "r" * int(rng.integers(1, 30)),
        }
        | extra
        for _ in range(count)
    ]
    return Loader(tokenizer=TOKENIZER).load(rows).examples


def lists(count):
    rows = [
        {"prompt": "q", "responses": ["a" * (i + 1), "bb", "ccc"][: 2 + i % 2]}
        for i in range(count)
    ]
    return Loader(tokenizer=TOKENIZER).load(rows).examples


@pytest.mark.parametrize("sizes", [{"groups_per_batch": 4}, {"token_budget": 200}], ids=str)
def test_every_example_once_and_in_the_seeds_order(sizes):
    examples = pairs(37)
    plan = plan_batches(examples, seed=1, epoch=0, **sizes)
    assert sorted(i for batch in plan for i in batch) == list(range(37))
    assert plan == plan_batches(examples, seed=1, epoch=0, **sizes)
    assert plan != plan_batches(examples, seed=1, epoch=1, **sizes)
    assert plan != plan_batches(examples, seed=2, epoch=0, **sizes)
    kept = plan_batches(examples, seed=1, shuffle=False, **sizes)
    assert [i for batch in kept for i in batch] == list(range(37))


def test_group_counts_and_drop_last():
    examples = pairs(10)
    sizes = [len(b) for b in plan_batches(examples, seed=0, groups_per_batch=4)]
    assert sizes == [4, 4, 2]
    dropped = plan_batches(examples, seed=0, groups_per_batch=4, drop_last=True)
    assert [len(b) for b in dropped] == [4, 4]


def test_token_budget_holds_and_is_used():
    examples = pairs(200)
    plan = plan_batches(examples, seed=3, token_budget=300)
    used = [sum(examples[i].num_tokens for i in batch) for batch in plan]
    assert max(used) <= 300
    # A batch is closed only by a group that did not fit.
    for batch, following, tokens in zip(plan[:-1], plan[1:], used[:-1], strict=True):
        assert batch and tokens + examples[following[0]].num_tokens > 300


def test_plan_errors():
    examples = pairs(3)
    with pytest.raises(ValueError, match="exactly one of groups_per_batch and token_budget"):
        plan_batches(examples, seed=0)
    with pytest.raises(ValueError, match=r"never split, and row \d has \d+ tokens over its 2 seq"):
        plan_batches(examples, seed=0, token_budget=5)
    with pytest.raises(ValueError, match="padded batches need groups_per_batch"):
        plan_batches(examples, seed=0, token_budget=500, packing=False)
    with pytest.raises(ValueError, match="at least one example"):
        plan_batches([], seed=0, groups_per_batch=1)
    with pytest.raises(ValueError, match="groups_per_batch must be at least 1"):
        plan_batches(examples, seed=0, groups_per_batch=0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 200))
def test_plan_equals_the_loop(costs, budget):
    want, used = [0], 0
    for i, cost in enumerate(costs):
        if used + cost > budget:
            want.append(i)
            used = 0
        used += cost
    want.append(len(costs))
    assert plan_in_order(np.array(costs, dtype=np.int64), budget) == want


def check_rows(batch, sequences):
    """Every scored row predicts the next token of its own sequence; responses are scored."""
    flat_ids, flat_targets = batch.input_ids.flatten(), batch.targets.flatten()
    width = batch.input_ids.shape[1]
    for s, seq in enumerate(sequences):
        start = int(batch.cu_seqlens[s]) if batch.cu_seqlens is not None else s * width
        n = len(seq.input_ids)
        for t in range(n):
            assert flat_ids[start + t] == seq.input_ids[t]
            assert batch.position_ids.flatten()[start + t] == t
            scored = seq.completion_start - 1 <= t < n - 1
            want = seq.input_ids[t + 1] if scored else IGNORE
            assert flat_targets[start + t] == want


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("make", [pairs, lists], ids=["pairs", "lists"])
def test_collate(packed, make):
    examples = make(5)
    sequences = [s for e in examples for s in e.sequences]
    batch = collate(examples, packed=packed, pad_id=7)
    check_rows(batch, sequences)
    assert batch.num_scored == sum(s.length for s in sequences)
    assert batch.num_scored == int((batch.targets != IGNORE).sum())
    assert batch.num_tokens == sum(len(s.input_ids) for s in sequences)
    sizes = [len(e.sequences) for e in examples]
    assert batch.cu_groups.tolist() == [0, *np.cumsum(sizes)] and batch.rows == [0, 1, 2, 3, 4]
    assert batch.cu_groups.dtype == torch.int32
    if packed:
        assert batch.attention_mask is None and batch.input_ids.shape == (1, batch.num_tokens)
        assert batch.cu_seqlens.dtype == torch.int32
    else:
        assert batch.cu_seqlens is None and int(batch.attention_mask.sum()) == batch.num_tokens
        padded = batch.attention_mask == 0
        assert (batch.input_ids[padded] == 7).all() and (batch.targets[padded] == IGNORE).all()
        assert (collate(examples, packed=False).input_ids[padded] == 0).all()
    if make is lists:
        assert batch.relevance.tolist() == [y for e in examples for y in e.relevance]
        assert batch.relevance.dtype == torch.float32
    else:
        assert batch.relevance is None
    assert batch.desirable is None


def test_labels_of_single_answers_are_bools():
    rows = [{"prompt": "a", "completion": "b", "label": flag} for flag in (True, False, True)]
    batch = collate(Loader(tokenizer=TOKENIZER).load(rows).examples)
    assert batch.desirable.dtype == torch.bool and batch.desirable.tolist() == [True, False, True]
    assert batch.relevance is None
    assert batch.cu_groups.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_collate_weights(packed):
    rows = [
        {"prompt": "p: ", "chosen": "abc", "rejected": "de", "weight": 0.5,
         "chosen_weights": [1.0, 2.0, 3.0, 4.0], "rejected_weights": None},
        {"prompt": "p: ", "chosen": "f", "rejected": "gh"},
    ]  # fmt: skip
    batch = collate(Loader(tokenizer=TOKENIZER).load(rows).examples, packed=packed)
    assert batch.weights.tolist() == [0.5, 1.0] and batch.ref_seq_logp is None
    scored = batch.targets != IGNORE
    assert (batch.token_weights[~scored] == 0).all()
    assert batch.token_weights[scored].tolist() == [1, 2, 3, 4] + [1.0] * (3 + 2 + 3)
    # Each weight sits at the row that predicts its token.
    by_token = dict(
        zip(batch.targets[scored].tolist(), batch.token_weights[scored].tolist(), strict=True)
    )
    assert by_token[TOKENIZER("b")["input_ids"][0]] == 2.0


def test_collate_reference_columns_and_device():
    reference = {"ref_chosen_logps": -1.25, "ref_rejected_logps": -2.5}
    batch = collate(pairs(2, **reference)).to("cpu")
    assert batch.ref_seq_logp.tolist() == [-1.25, -2.5] * 2
    assert batch.ref_seq_logp.dtype == torch.float64
    assert collate(pairs(1, **reference) + pairs(1)).ref_seq_logp is None
    assert batch.to("meta").targets.device.type == "meta" and batch.to("meta").rows == batch.rows


def test_collate_refuses_empty_and_mixed_batches():
    with pytest.raises(ValueError, match="empty batch"):
        collate([])
    with pytest.raises(ValueError, match="one layout"):
        collate(pairs(1) + lists(1))
