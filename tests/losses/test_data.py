"""Data and numbers that come in tensors: the same ranges as of plain numbers, indices in range, and
what is no number is never hidden."""

from __future__ import annotations

import math

import pytest
import torch
from loss_batch import Batch
from loss_examples import LISTWISE, PAIRWISE, POINTWISE, TOKENWISE, Example

from prefkern import LOSSES, losses
from prefkern.losses.weights import model_ratios

pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")
BATCH = Batch()
TRAINED = [name for name in LOSSES if LOSSES[name].family != "diffusion"]
BETA = [n for n in TRAINED if "beta" in losses.arguments(n)]


def refused(name: str, argument: str, value, **more) -> None:
    with pytest.raises(ValueError, match=rf"^loss '{name}': .*\b{argument}\b"):
        BATCH(name, **{argument: value, **more})


@pytest.mark.parametrize("name", BETA)
def test_a_beta_in_a_tensor_is_in_range_too(name):
    for number in (math.nan, math.inf, -0.5):
        with pytest.raises(ValueError, match="beta"):
            BATCH(name, beta=torch.tensor(number))


@pytest.mark.parametrize("name", [n for n in PAIRWISE + POINTWISE if n in BETA])
def test_also_where_the_loss_is_called_alone(name):
    example = Example(name, 3)
    for number in (math.inf, torch.tensor(math.nan), torch.tensor(-0.5)):
        example.extra["beta"] = number
        with pytest.raises(ValueError, match="beta"):
            example()


def test_one_value_per_item():
    for bad in ([math.nan, 0.1, 0.1], [0.1, -0.1, 0.1], [0.0, 1.0, 1.0]):
        refused("dpo", "beta", torch.tensor(bad))
    refused("dpo", "pair_weight", torch.tensor([1.0, -1.0, 1.0]))
    refused("dpo", "pair_weight", -1.0)
    assert BATCH("dpo", beta=torch.tensor([0.1, 0.2, 0.3]))[0] > 0


@pytest.mark.parametrize("name", [n for n in TRAINED if LOSSES[n].supervised is not None])
def test_a_likelihood_is_never_pushed_down(name):
    argument = LOSSES[name].supervised.argument
    for number in (-1.0, -1e-9, math.nan, torch.tensor(-1.0)):
        refused(name, argument, number)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("sppo", "p_win", -1.0), ("sppo", "p_lose", 1.5), ("ipo_md", "preference_prob", -0.1),
        ("sppo", "p_win", torch.tensor([0.5, 1.5, 0.5])),
        ("soft_label", "pref_prob", torch.tensor([0.5, 1.5, 0.5])),
        ("soft_pairs", "pref_prob", torch.tensor([0.5, -0.1, 0.5])),
        ("grpo", "tokens_per_sequence", -1.0), ("trpa", "pairs_per_sequence", -1.0),
        ("mm_dpo", "w_visual", -1.0), ("bco", "undesirable_weight", -1.0),
        ("adpa", "adpa_weight", -1.0), ("dckd", "distillation_weight", -1.0),
        ("more", "source_weights", torch.tensor([0.5, -0.5])),
    ],
)  # fmt: skip
def test_probabilities_weights_and_counts(name, argument, value):
    refused(name, argument, value)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("more", "source", torch.tensor([0, 2])), ("more", "source", torch.tensor([-1, 0])),
        ("more", "source", torch.tensor([True, False])),
        ("soft_pairs", "pairs", torch.tensor([[0, 1], [0, 2], [4, 6]])),
        ("soft_pairs", "pairs", torch.tensor([[0, 1], [0, -1], [4, 3]])),
        ("adpo", "step_index", torch.full((6, 5), 2**40)),
        ("adpo", "step_index", torch.full((6, 5), -1)), ("adpo", "step_index", torch.ones(6, 5)),
        ("tree_tpo", "step_index", torch.full((6, 5), 31)),
        ("tree_tpo", "step_index", torch.ones(6, 5)), ("mapo", "hook_type", torch.ones(2)),
        ("pro", "logp", torch.full((5,), 0.5)), ("rrhf", "logp", torch.full((5,), 0.5)),
    ],
)  # fmt: skip
def test_indices_are_integers_in_range(name, argument, value):
    """A negative one would count from the end, one beyond would run into another."""
    refused(name, argument, value)


def test_a_weight_for_every_source():
    with pytest.raises(ValueError, match="source must be from 0 to 0"):
        BATCH("more", source_weights=torch.tensor([1.0]))


DATA = [
    (name, argument)
    for name in TRAINED
    for argument, value in BATCH.given(name).items()
    if isinstance(value, torch.Tensor) and value.is_floating_point()
    if not argument.startswith("aux_h")
]


@pytest.mark.parametrize(("name", "argument"), DATA)
def test_data_hold_real_numbers_and_nan_is_never_hidden(name, argument):
    value = BATCH.given(name)[argument]
    refused(name, argument, value.to(torch.complex64))
    if not argument.endswith("_mask"):
        refused(name, argument, value > 0)
    try:
        assert BATCH(name, **{argument: value * math.nan})[0].isnan()
    except ValueError as error:  # a number of the whole batch, or one with a range
        assert argument in str(error)


def test_ranks_of_what_is_no_number():
    n = torch.zeros(6)
    bad = torch.tensor([0.1, math.nan, 0.2, 0.3, math.nan, 0.4])
    scored = torch.tensor([True, True, True, True, False, True])
    stage = {"sign": torch.ones(6), "scored": scored, "cu_seqlens": torch.tensor([0, 3, 6])}
    for transform in ("exp", "threshold", "rank_based", "binary"):
        found = model_ratios.tisdpo(bad, n, **stage, transform=transform, keep=0.5).weights
        assert found.isnan().tolist() == [False, True, False, False, False, False]
        assert found[4] == 0
    found = model_ratios.sepo(bad, n, **stage).weights
    assert found.isnan().tolist() == [False, True, False, False, False, False] and found[4] == 0


# ---- statistics of a loss called alone -----------------------------------------------------------

ALONE = [n for n in PAIRWISE + POINTWISE + TOKENWISE if {"logp"} <= set(LOSSES[n].stats)]


@pytest.mark.parametrize("name", ALONE)
def test_statistics_that_do_not_belong_together(name):
    """One of another shape would broadcast: over pairs, or to a square of them."""
    example = Example(name, 4)
    row = example.rows[-1]
    for field in ("logp", "ref_logp"):
        value = getattr(row, field)
        for bad in (value[:1], value[0], value[:, None], value[None], value[:-1],
                    value > 0, value.to(torch.complex64)):  # fmt: skip
            example.rows[-1] = row._replace(**{field: bad})
            with pytest.raises(ValueError, match=rf"^loss '{name}': \w+\.\w+ must (have|hold|be)"):
                example()


@pytest.mark.parametrize("name", LISTWISE)
def test_scores_and_labels_hold_numbers(name):
    example = Example(name, 4)
    (seq,) = example.rows
    record, cu = example.record, torch.tensor([0, 2, 4], dtype=torch.int32)
    scores, relevance = getattr(seq, record.score), torch.arange(4.0).double()
    filled = {k: getattr(seq, k) for k in record.extra if k not in example.extra} | example.extra
    for bad in (lambda x: x > 0, lambda x: x.to(torch.complex128)):
        with pytest.raises(ValueError, match=rf"^loss '{name}': scores must hold real numbers"):
            record(bad(scores), relevance, cu, **filled)
        with pytest.raises(ValueError, match=rf"^loss '{name}': relevance must hold real numbers"):
            record(scores, bad(relevance), cu, **filled)
    for bad in (
        cu[:-1],
        cu[:, None],
        cu.double(),
        torch.tensor([0, 2, 5]),
        torch.tensor([0, 3, 2]),
    ):
        with pytest.raises(ValueError, match=rf"^loss '{name}': (cu_groups|source) must"):
            record(scores, relevance, bad, **filled)
