"""Properties that every loss of LOSSES must have. Nothing here names a formula."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import vectors
from loss_examples import (
    ALL,
    BATCH_COUPLED,
    EVERY,
    LIKELIHOOD_ONLY,
    PAIRWISE,
    POINTWISE,
    TOKENWISE,
    Example,
    spread,
)  # fmt: skip

from prefkern import losses
from prefkern.losses.record import Loss
from prefkern.stats import SeqStats, TokenStats

# A provisional loss says so once; test_bad_input.py asserts it.
pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")

# Losses with a kink where policy equals reference: the one-sided derivatives differ there.
KINK_AT_ZERO = {"dpop", "scir", "selfie", "uni_dpo"}
# Losses whose weight or label is a constant formed from the same log-probabilities: a finite
# difference sees it move. Their gradients are proven by the vectors.
CONSTANT_FROM_POLICY = {
    "wpo",
    "beta_dpo",
    "lcpo",
    "lcpo_simpo",
    "lcpo_cpo",
    "fdpg",
    "oreo",
    "knowpat",
    "full_step_dpo",
}
# Distils both answers of a pair alike; what tells them apart is the likelihood term.
SYMMETRIC = {"dckd"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("margin", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("name", ALL)
def test_value_and_gradient_are_finite(name, margin, dtype):
    example = Example(name, offsets=(margin, -margin), dtype=dtype)
    loss = example()
    # sums over tokens come in fp64
    assert loss.dtype == dtype or (example.record.family == "tokenwise" and loss.numel() == 5)
    assert torch.isfinite(loss).all()
    assert loss.requires_grad != (name in LIKELIHOOD_ONLY)
    if not loss.requires_grad:
        return
    for grad in torch.autograd.grad(loss.sum(), example.leaves(), allow_unused=True):
        assert grad is None or torch.isfinite(grad).all()


@pytest.mark.parametrize("width", [0.0, 3.0])
@pytest.mark.parametrize(
    "name", [n for n in ALL if n not in CONSTANT_FROM_POLICY | LIKELIHOOD_ONLY]
)
def test_gradcheck(name, width):
    if width == 0.0 and name in KINK_AT_ZERO:
        pytest.skip("one-sided derivatives differ at the kink; test_edges.py states the convention")
    n = 6  # even: no pair of the spread sits on a kink at 0
    example = Example(name, n, (spread(n, width), spread(n, -0.7 * width).flip(0)))
    record, rows = example.record, example.rows
    detached = name_of_detached(record)
    places = [
        (i, f)
        for i, row in enumerate(rows)
        for f in row._fields
        if getattr(row, f) is not None and getattr(row, f).requires_grad and (i, f) not in detached
    ]

    def call(*leaves):
        new = [row._replace() for row in rows]
        for (i, field), leaf in zip(places, leaves, strict=True):
            new[i] = new[i]._replace(**{field: leaf})
        example.rows = new
        return example()

    # A step of 1e-6 on log-ratios whose ties matter would cross the tie, and lambda weights jump
    # there; list losses with constant weights under differentiation are checked away from ties.
    if record.family == "listwise" and width == 0.0:
        pytest.skip(
            "rank weights jump at score ties; tests/losses/test_list_rank.py covers ties exactly"
        )
    leaves = [getattr(rows[i], f).detach().clone().requires_grad_() for i, f in places]
    assert torch.autograd.gradcheck(
        call, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, check_undefined_grad=False
    )


def name_of_detached(record: Loss) -> set[tuple[int, str]]:
    """(row, field) that a loss holds constant although its value depends on them."""
    return {"tdpo2": {(0, "fkl")}}.get(record.name, set())


@pytest.mark.parametrize("name", [n for n in PAIRWISE + POINTWISE if n not in BATCH_COUPLED])
def test_batch_is_the_sum_of_its_parts(name):
    n = 6
    example = Example(name, n, (spread(n, 4.0), spread(n, -2.0)))
    whole = example()
    assert whole.shape == (n,)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(example.index(order)(), whole[order])
    parts = torch.cat([example.index(slice(i, i + 1))() for i in range(n)])
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("name", PAIRWISE + POINTWISE)
def test_empty_batch(name):
    loss = Example(name, 0, (torch.zeros(0), torch.zeros(0)))()
    assert loss.shape == (0,)


@pytest.mark.parametrize("name", TOKENWISE)
def test_tokens_that_do_not_count_are_not_read(name):
    clean, dirty = Example(name, 6, (spread(6, 1.0), 0.0)), Example(name, 6, (spread(6, 1.0), 0.0))
    out = ~dirty.extra["scored"]
    fields = {
        f: torch.where(out, torch.nan, x.detach()).requires_grad_(x.requires_grad)
        for f, x in dirty.rows[0]._asdict().items()
        if x is not None
    }
    dirty.rows = [TokenStats(**fields)]
    assert torch.equal(dirty(), clean())
    (grad,) = torch.autograd.grad(dirty().sum(), dirty.rows[0].logp)
    assert torch.isfinite(grad).all() and (grad[out] == 0).all()


@pytest.mark.parametrize("name", TOKENWISE)
def test_tokenwise_refuses_what_is_missing(name):
    example = Example(name, 4)
    example.rows = [example.rows[0]._replace(logp=None)]
    with pytest.raises(ValueError, match="logp"):
        example()
    example = Example(name, 4)
    example.extra["scored"] = example.extra["scored"][:3]
    with pytest.raises(ValueError, match="scored must be"):
        example()


@pytest.mark.parametrize("name", TOKENWISE)
def test_no_tokens_at_all(name):
    example = Example(name, 4)
    example.extra["scored"] = torch.zeros(8, dtype=torch.bool)
    loss = example()
    assert torch.isfinite(loss).all()
    (grad,) = torch.autograd.grad(loss.sum(), example.rows[0].logp)
    assert (grad == 0).all()


@pytest.mark.parametrize("name", [n for n in PAIRWISE if n not in LIKELIHOOD_ONLY | SYMMETRIC])
def test_swapping_the_answers_matters(name):
    example = Example(name, 4, (spread(4, 3.0) + 1.0, -spread(4, 3.0)))
    before = example()
    example.rows[0], example.rows[1] = example.rows[1], example.rows[0]
    assert not torch.allclose(before, example())


@pytest.mark.parametrize("name", PAIRWISE)
def test_sides_must_match(name):
    example = Example(name, 4)
    example.rows[1] = example.rows[1].index(slice(0, 1))
    with pytest.raises(ValueError, match=r"\[4\]"):
        example()


@pytest.mark.parametrize("name", PAIRWISE + POINTWISE)
def test_missing_statistics_are_named(name):
    example = Example(name, 3)
    record = example.record
    if record.needs_reference:
        example.rows = [r._replace(ref_logp=None) for r in example.rows]
        with pytest.raises(ValueError, match="ref_logp"):
            example()
    for stat in record.stats:
        example = Example(name, 3)
        example.rows = [r._replace(**{stat: None}) for r in example.rows]
        with pytest.raises(ValueError, match=stat):
            example()


@pytest.mark.parametrize("name", PAIRWISE + POINTWISE)
def test_statistics_that_are_not_declared_are_not_read(name):
    example = Example(name, 3)
    declared = {s.partition(":")[0] for s in example.record.stats} | {"length", "logp"}
    declared |= {"ref_logp"} if example.record.needs_reference else set()
    example.rows = [SeqStats(**{f: getattr(r, f) for f in declared}) for r in example.rows]
    assert torch.isfinite(example()).all()
    if example.record.rewards is not None:
        bound = losses.bind(example.record, {}, supplied=losses.required(example.record))
        for row in example.rows:
            assert example.record.rewards(row, **bound.hyper).shape == row.logp.shape


@pytest.mark.parametrize("name", ALL)
def test_traces_whole(name):
    example = Example(name, 4, (spread(4, 3.0), spread(4, -1.0)))
    torch.compiler.reset()
    got = torch.compile(lambda: example(), fullgraph=True, backend="eager")()
    assert torch.equal(got, example())


@pytest.mark.parametrize("name", EVERY)
def test_documentation(name):
    record = losses.LOSSES[name]
    text = inspect.getdoc(record.fn)
    assert re.search(r"^l = |^    ?l = |\nl = |\nl_", text), "the formula, as l = ..."
    assert "arXiv" in text, "where the formula comes from"
    assert "Returns:" in text and ("Raises:" in text)
    described = set(re.findall(r"^ {4}([\w, ]+):", text.split("Args:")[1], re.M))
    described = {n.strip() for names in described for n in names.split(",")}
    assert set(inspect.signature(record.fn).parameters) <= described
    assert record.status and record.source and record.rewards is not None
    assert record.name == name and record.fn.__module__.split(".")[-2] == record.family


@pytest.mark.parametrize("name", EVERY)
def test_unknown_argument_names_the_nearest(name):
    record = losses.LOSSES[name]
    known = next(iter(losses.arguments(record)))
    with pytest.raises(ValueError, match=re.escape(known)):
        losses.bind(record, {known + "x": 1.0}, supplied=losses.required(record))


def test_every_alias_binds():
    for alias, (name, fixed) in losses.ALIASES.items():
        assert alias not in losses.LOSSES or name == alias
        record, arguments = losses.resolve(alias)
        assert record is losses.LOSSES[name] and arguments == fixed
        losses.bind(record, arguments, supplied=losses.required(record))


def test_unknown_loss_names_the_nearest():
    with pytest.raises(ValueError, match="tdpo2"):
        losses.resolve("tdpo3")
    with pytest.raises(AttributeError):
        losses.no_such_loss  # noqa: B018


def test_required_arguments_are_asked_for():
    with pytest.raises(ValueError, match="kl_baseline"):
        losses.bind(losses.kto, {}, supplied=("desirable",))
    with pytest.raises(ValueError, match="aux_logp"):
        losses.bind(losses.tgdpo, {"beta": 0.2})


def test_shared_arguments_go_to_both():
    given = {"beta": 0.2, "alpha": 0.3, "aux_logp": torch.zeros(3)}
    bound = losses.bind(losses.tgdpo, given)
    assert bound.args == {"beta": 0.2}
    assert bound.stage == given
    assert bound.hyper["clamp"] is None and bound.hyper["beta"] == 0.2
    assert losses.bind(losses.dpo, {"reference_free": True}).needs_reference is False
    masks = {"reward_mask": None, "kl_mask": None}
    assert losses.bind(losses.sparsepo, {"kl_direction": "pol_ref", **masks}).stats == (
        "logp",
        "rkl",
    )


def test_vectors_helper_sees_the_registry():
    assert {c["loss"] for c in vectors.pair_cases(("pairwise", "pointwise"))} <= set(losses.LOSSES)
