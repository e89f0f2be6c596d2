"""Every loss on input that is wrong, empty, tied or extreme: as documented, or an error that says
which loss and which argument."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings

import pytest
import torch
from loss_examples import (
    ALL,
    BATCH_COUPLED,
    EVERY,
    LIKELIHOOD_ONLY,
    LISTWISE,
    PAIRWISE,
    POINTWISE,
    TOKENWISE,
    Example,
    positional,
    spread,
)  # fmt: skip

from prefkern import PreferenceLoss, loss_from_stats, losses, preference_loss
from prefkern.losses import record as declaration
from prefkern.losses.pointwise.kto import kl_baseline
from prefkern.stats import SeqStats, TokenStats

pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")
NEEDS_REFERENCE = [
    n for n in ALL if losses.LOSSES[n].needs_reference and losses.LOSSES[n].reference is True
]
SMOOTHED = [
    n for n in EVERY if "label_smoothing" in inspect.signature(losses.LOSSES[n].fn).parameters
]


def gradients(loss, example):
    leaves = example.leaves()
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("name", NEEDS_REFERENCE)
def test_a_missing_reference_names_the_loss(name):
    """Through preference_loss, which every loss of a family with hidden states goes through."""
    record = losses.LOSSES[name]
    hidden = torch.zeros(6, 3, 4)
    whole = torch.zeros(6, 3, dtype=torch.int64)
    filled = ("desirable", "scored", "cu_groups")
    given = {k: torch.ones(6, 3) for k in losses.required(record) if k not in filled}
    lists = record.family == "listwise" or "cu_groups" in record.extra
    with pytest.raises(ValueError, match=rf"loss {name} needs (a|the) reference"):
        preference_loss(
            hidden,
            torch.zeros(5, 4),
            whole,
            loss=name,
            relevance=torch.zeros(6),
            cu_groups=torch.tensor([0, 3, 6]) if lists else None,
            **given,
        )


@pytest.mark.parametrize("name", PAIRWISE + POINTWISE)
def test_a_missing_statistic_names_the_loss(name):
    example = Example(name, 3)
    if name not in LIKELIHOOD_ONLY:
        example.rows = [SeqStats(length=r.length) for r in example.rows]
        with pytest.raises(ValueError, match=rf"^loss '{name}': this loss needs"):
            example()


@pytest.mark.parametrize("name", ALL)
def test_empty_answers(name):
    """Answers of length 0, whose sums are 0, beside others: finite, also where a loss divides."""
    example = Example(name, 6, (spread(6, 2.0), spread(6, -1.0)))
    if example.record.family == "tokenwise":
        example.extra["scored"] = torch.arange(12) >= 4  # the first two sequences are empty
    else:
        empty = torch.tensor([True, False, False, True, False, False])
        example.rows = [
            SeqStats(
                *(None if f is None else torch.where(empty, 0.0, f.detach()).requires_grad_()
                  for f in row)
            )
            for row in example.rows
        ]  # fmt: skip
    loss = example()
    assert torch.isfinite(loss).all()
    if loss.requires_grad:
        assert all(torch.isfinite(g).all() for g in gradients(loss, example))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", [n for n in PAIRWISE + POINTWISE if n not in BATCH_COUPLED])
def test_a_score_that_is_no_number_stays_in_its_item(name, bad):
    clean = Example(name, 4, (spread(4, 2.0), spread(4, -1.0)))
    dirty = Example(name, 4, (spread(4, 2.0), spread(4, -1.0)))
    logp = dirty.rows[0].logp.detach().clone()
    logp[1] = bad
    dirty.rows[0] = dirty.rows[0]._replace(logp=logp.requires_grad_())
    want, got = clean(), dirty()
    others = torch.tensor([0, 2, 3])
    assert torch.equal(got[others], want[others])
    if name not in LIKELIHOOD_ONLY and math.isnan(bad) and "logp" in clean.record.stats:
        assert got[1].isnan()  # never hidden
    if want.requires_grad:
        pairs = zip(gradients(want, clean), gradients(got, dirty), strict=True)
        assert all(torch.equal(a[others], b[others]) for a, b in pairs)


@pytest.mark.parametrize("name", [n for n in LISTWISE if n != "soft_pairs"])
def test_a_score_that_is_no_number_stays_in_its_list(name):
    want = Example(name, 6, (spread(6, 2.0), 0.0))()
    example = Example(name, 6, (spread(6, 2.0), 0.0))
    for bad in (math.nan, math.inf, -math.inf):
        logp = example.rows[0].logp.detach().clone()
        logp[4] = bad
        example.rows[0] = example.rows[0]._replace(logp=logp)
        got = example()
        assert got[0].item() == want[0].item() and not torch.isfinite(got[1]), bad


@pytest.mark.parametrize("name", LISTWISE)
def test_lists_of_one_and_of_ties(name):
    """No comparison, no ranking: 0 without gradient, except where a loss says otherwise."""
    alone = {"point_mse", "point_sigmoid", "nca", "rrhf", "knowpat", "bialign"}  # act on one answer
    tied = alone | {"list_mle", "sdpo", "kpo", "softmax", "infonca", "approx_ndcg", "neural_ndcg"}
    record = losses.LOSSES[name]
    for sizes, equal in (((1, 1, 1), False), ((3,), True)):
        example = Example(name, 3, (spread(3, 1.0), 0.0))
        (seq,) = example.rows
        bounds = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
        given = {k: v for k, v in example.extra.items() if k != "source"}
        if "source" in record.extra:
            given["source"] = torch.zeros(len(sizes), dtype=torch.int64)
        if "pairs" in given:
            given |= {"pairs": torch.zeros(0, 2).long(), "pref_prob": torch.zeros(0).double()}
        filled = {k: getattr(seq, k) for k in record.extra if k not in example.extra}
        relevance = torch.full((3,), 0.5).double() if equal else torch.arange(3).double()
        loss = record(getattr(seq, record.score), relevance, bounds, **filled, **given)
        assert loss.shape == (len(sizes),) and torch.isfinite(loss).all()
        if loss.requires_grad:
            assert all(torch.isfinite(g).all() for g in gradients(loss, example))
        if name not in (tied if equal else alone):
            assert (loss == 0).all(), sizes


@pytest.mark.parametrize("name", SMOOTHED)
def test_label_smoothing(name):
    """0.5 is legal, but for `robust`, which divides by 1 - 2 eps; beyond, everybody refuses."""
    example = Example(name, 3, (spread(3, 1.0), 0.0))
    for value in (0.6, -0.1, math.nan):
        example.extra["label_smoothing"] = value
        with pytest.raises(ValueError, match=rf"^loss '{name}': label_smoothing must be"):
            example()
    example.extra["label_smoothing"] = 0.5
    if name == "robust":
        with pytest.raises(ValueError, match="label_smoothing must be"):
            example()
    else:
        assert torch.isfinite(example()).all()


@pytest.mark.parametrize("name", sorted(set(ALL) - set(LISTWISE) - {"kl_penalty"}))
def test_exponents_do_not_overflow(name):
    """A log-ratio of -+3e38, the end of fp32: the loss may be infinite (a square), never NaN, and
    no gradient is NaN. test_properties.py has +-1e4, where all is finite."""
    for margin in (3e37, -3e37):
        example = Example(name, 3, (margin, -margin), torch.float32)
        loss = example()
        assert not loss.isnan().any(), margin
        if loss.requires_grad:
            assert not any(g.isnan().any() for g in gradients(loss, example)), margin


@pytest.mark.parametrize("name", EVERY)
def test_unknown_arguments(name):
    record = losses.LOSSES[name]
    with pytest.raises(TypeError, match="no_such_argument"):
        record(*[None] * len(positional(record)), no_such_argument=1)
    with pytest.raises(ValueError, match=rf"loss '{name}' has no argument 'no_such_argument'"):
        losses.bind(record, {"no_such_argument": 1}, supplied=losses.required(record))


@pytest.mark.parametrize("name", [n for n in EVERY if losses.LOSSES[n].provisional])
def test_provisional_losses_warn_once_however_they_are_called(name, monkeypatch):
    monkeypatch.setattr(declaration, "_warned", set())
    record = losses.LOSSES[name]
    with pytest.warns(UserWarning, match=f"loss {name!r} is provisional"), pytest.raises(TypeError):
        record()  # before anything else, also where the call then fails
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses.bind(record, {}, supplied=losses.required(record))
        with pytest.raises(TypeError):
            record()
    monkeypatch.setattr(declaration, "_warned", set())
    with pytest.warns(UserWarning, match=f"loss {name!r} is provisional"):
        losses.bind(record, {}, supplied=losses.required(record))


def warned_at(action) -> int:
    """The line of this file that the one warning of `action` points at."""
    declaration._warned.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(TypeError):  # the call may lack arguments; the warning comes first
            action()
    (warning,) = caught
    assert warning.filename == __file__, warning
    return warning.lineno


def test_a_provisional_loss_warns_at_the_callers_line(monkeypatch):
    """Alone, as a record, bound, in the objective, in its module, fixed in one beforehand; and
    where a provisional loss is one of images or of lists."""
    monkeypatch.setattr(declaration, "_warned", set())
    batch = (torch.zeros(4, 3, 4), torch.zeros(5, 4), torch.zeros(4, 3, dtype=torch.int64))
    ref = {"ref_logp": torch.zeros(4, 3), "judge_logit_gap": torch.zeros(2)}
    answer = SeqStats(logp=torch.zeros(2), ref_logp=torch.zeros(2), length=torch.ones(2))
    module = PreferenceLoss("scir", metrics=False)
    error, parts = torch.zeros(2), torch.zeros(2, 3)
    bounds = torch.tensor([0, 2], dtype=torch.int32)
    here = inspect.currentframe().f_lineno
    actions = [
        lambda: losses.scir(answer, answer, judge_logit_gap=torch.zeros(2)),
        lambda: losses.LOSSES["scir"](answer, answer, judge_logit_gap=torch.zeros(2)),
        lambda: losses.scir(),
        lambda: losses.bind("scir", {}, supplied=("judge_logit_gap",)),
        lambda: preference_loss(*batch, loss="scir", **ref),
        lambda: loss_from_stats(TokenStats(torch.zeros(4, 3)), batch[2], loss="scir",
                                ref_seq_logp=torch.zeros(4), judge_logit_gap=torch.zeros(2)),
        lambda: module(*batch, **ref),
        lambda: losses.tlpo(parts, parts, parts, parts),
        lambda: losses.rank_gap_hinge(error, error, bounds),
    ]  # fmt: skip
    lines = [warned_at(action) for action in actions]
    # one line each, but the sixth, which takes two
    assert [line - here for line in lines] == [2, 3, 4, 5, 6, 7, 9, 10, 11]


def test_ktos_warning_points_at_the_caller():
    one = SeqStats(logp=torch.zeros(1), ref_logp=torch.zeros(1))
    with pytest.warns(UserWarning, match="a single row") as caught:
        kl_baseline(one)
    assert caught[0].filename == __file__


def test_only_provisional_losses_warn(monkeypatch):
    monkeypatch.setattr(declaration, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in sorted({*PAIRWISE, *POINTWISE, *TOKENWISE}):
            if not losses.LOSSES[name].provisional:
                Example(name, 3)()
