"""Sequence sums, roles of sequences, weights: against loops."""

import pytest
import torch

from prefkern.losses.record import TokenWeights
from prefkern.objective import segments
from prefkern.stats import SeqStats, TokenStats

CU = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
TARGETS = torch.tensor([1, -100, 2, 0, 1, -100, 3])


def tokens():
    g = torch.Generator().manual_seed(0)
    x = {n: torch.randn(7, generator=g) for n in ("logp", "ref_logp", "fkl")}
    for v in x.values():
        v[TARGETS == -100] = 0.0
    return TokenStats(**x)


def loop_sum(x, w=None):
    w = torch.ones(7) if w is None else w
    return [
        sum(x[i].item() * w[i].item() for i in range(CU[s], CU[s + 1]) if TARGETS[i] != -100)
        for s in range(3)
    ]


def test_sums_and_length():
    seq = segments.sequence_stats(tokens(), TARGETS, CU)
    assert seq.length.tolist() == [2, 0, 3]
    for name in ("logp", "ref_logp", "fkl"):
        got = getattr(seq, name)
        assert got.dtype == torch.float64
        assert got.tolist() == pytest.approx(loop_sum(getattr(tokens(), name)), abs=1e-12)
    assert seq.mean_logratio[1] == 0


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_weights_and_their_gradient(kind):
    t = tokens()
    w = torch.rand(7, requires_grad=True)
    weights = w if kind == "tensor" else {"logp": w}
    seq = segments.sequence_stats(t, TARGETS, CU, token_weights=weights)
    assert seq.logp.tolist() == pytest.approx(loop_sum(t.logp, w), abs=1e-6)
    assert seq.ref_logp.tolist() == pytest.approx(loop_sum(t.ref_logp, w), abs=1e-6)
    assert seq.fkl.tolist() == pytest.approx(
        loop_sum(t.fkl, w if kind == "tensor" else None), abs=1e-6
    )
    seq.logratio.sum().backward()
    torch.testing.assert_close(
        w.grad, t.logp - t.ref_logp
    )  # the gradient of a weight is its statistic


def test_the_weight_of_an_ignored_token_is_read_by_nobody():
    t, w = tokens(), torch.rand(7)
    dirty = torch.where(TARGETS == -100, torch.nan, w)
    seq = segments.sequence_stats(t, TARGETS, CU, token_weights=dirty)
    assert seq.logp.tolist() == pytest.approx(loop_sum(t.logp, w), abs=1e-6)


def test_bad_weights():
    with pytest.raises(ValueError, match="shape of targets"):
        segments.sequence_stats(tokens(), TARGETS, CU, token_weights=torch.ones(6))
    with pytest.raises(ValueError, match="rkl"):
        segments.sequence_stats(tokens(), TARGETS, CU, token_weights={"rkl": torch.ones(7)})


def test_combine_weights():
    a, b = torch.rand(7), torch.rand(7)
    both = segments.combine_weights(TokenWeights({"logp": a}), b, ("logp", "ref_logp", "fkl"))
    torch.testing.assert_close(both["logp"], a * b)
    assert both["ref_logp"] is both["logp"] and both["fkl"] is b
    assert segments.combine_weights(None, None, ("logp",)) == {}
    assert set(segments.combine_weights(TokenWeights({"fkl": a}), None, ("logp", "fkl"))) == {"fkl"}


def test_layouts():
    seq = SeqStats(logp=torch.arange(6.0), length=torch.ones(6))
    chosen, rejected = segments.split_rows(seq, 2, "pairs", ("chosen", "rejected"))
    assert chosen.logp.tolist() == [0, 2, 4] and rejected.logp.tolist() == [1, 3, 5]
    chosen, rejected = segments.split_rows(seq, 2, "halves", ("chosen", "rejected"))
    assert chosen.logp.tolist() == [0, 1, 2] and rejected.logp.tolist() == [3, 4, 5]
    assert segments.role_of_sequence(6, 2, "pairs", CU.device).tolist() == [0, 1, 0, 1, 0, 1]
    assert segments.role_of_sequence(6, 2, "halves", CU.device).tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="multiple of 2"):
        segments.split_rows(seq.index(slice(0, 5)), 2, "pairs", ("chosen", "rejected"))
    with pytest.raises(ValueError, match="layout"):
        segments.split_rows(seq, 2, "columns", ("chosen", "rejected"))


def test_boundaries():
    assert segments.sequence_boundaries(torch.zeros(2, 3, dtype=torch.long), None).tolist() == [
        0,
        3,
        6,
    ]
    for cu, text in (
        ([0, 3, 2, 7], "never decrease"), ([1, 7], "start at 0"), ([0, 6], "end at 7"),
        ([0], "at least one"),
    ):  # fmt: skip
        targets = torch.zeros(7 if text != "at least one" else 0, dtype=torch.long)
        with pytest.raises(ValueError, match=text):
            segments.sequence_boundaries(targets, torch.tensor(cu, dtype=torch.int32))
    with pytest.raises(ValueError, match="cu_seqlens must be given"):
        segments.sequence_boundaries(TARGETS, None)
    with pytest.raises(ValueError, match="int32"):
        segments.sequence_boundaries(TARGETS, torch.tensor([0.0, 7.0]))
