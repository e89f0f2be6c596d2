"""Losses of reward models on plain scores: MORE, PAL, DPA-RAG's contrast, and what they need."""

from __future__ import annotations

import math

import pytest
import torch
from loss_batch import cu
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from prefkern import losses
from prefkern.losses.listwise.dpa_rag import sup_con
from prefkern.losses.listwise.more import head_gradients, min_norm_weights, source_weights
from prefkern.losses.listwise.pal import bound_penalty, ideal_point_scores, ideal_points


def test_shortest_combination_of_two_and_of_many():
    g = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert min_norm_weights(g).tolist() == pytest.approx([0.1, 0.9])
    # the shorter gradient already opposes nothing: it alone is the nearest point
    assert min_norm_weights(torch.tensor([[4.0, 1.0], [1.0, 0.5]])).tolist() == [0.0, 1.0]
    assert min_norm_weights(torch.zeros(3, 2)).sum().item() == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(0)
    for n, d, shift in ((5, 3, 0.0), (6, 9, 1.0), (4, 1, 0.5), (7, 2, 2.0), (3, 3, 0.0)):
        g = torch.randn(n, d, generator=generator, dtype=torch.float64) + shift
        g[-1] = g[0]  # parallel gradients
        weights = min_norm_weights(g)
        point = weights @ g
        assert (weights >= 0).all() and weights.sum().item() == pytest.approx(1.0)
        # optimal exactly where no gradient has a smaller product with the point
        assert (g @ point >= point @ point - 1e-9).all(), (n, d)
    with pytest.raises(ValueError, match="finite"):
        min_norm_weights(torch.tensor([[math.nan, 1.0]]))
    with pytest.raises(ValueError, match=r"\[n, D\]"):
        min_norm_weights(torch.zeros(3))


def reward_batch():
    """Two sources, three pairs each; a linear head on four features."""
    g = torch.Generator().manual_seed(2)
    features = torch.randn(12, 4, generator=g, dtype=torch.float64)
    head = torch.randn(4, generator=g, dtype=torch.float64).requires_grad_()
    relevance = torch.tensor([1.0, 0.0] * 6, dtype=torch.float64)
    return features, head, relevance, cu(*range(0, 13, 2)), torch.tensor([0, 1, 0, 1, 1, 0])


def test_more_is_the_weighted_mean_of_its_sources():
    features, head, relevance, groups, source = reward_batch()
    scores = features @ head
    plain = losses.bradley_terry(scores, relevance, groups)
    parts = [plain[source == k].mean() for k in (0, 1)]
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    loss = losses.more(scores, relevance, groups, source=source, source_weights=weight).mean()
    assert loss.item() == pytest.approx((0.3 * parts[0] + 0.7 * parts[1]).item())
    (grad,) = torch.autograd.grad(loss, head, retain_graph=True)
    for_each, value = head_gradients(features, scores, relevance, groups, source, 3)
    torch.testing.assert_close(grad, 0.3 * for_each[0] + 0.7 * for_each[1])
    assert value.tolist() == pytest.approx([parts[0].item(), parts[1].item(), 0.0])
    assert not for_each[2].any() and not for_each.requires_grad
    for k in (0, 1):
        (want,) = torch.autograd.grad(parts[k], head, retain_graph=True)
        torch.testing.assert_close(for_each[k], want)
    # a source that is not in the batch has no say, and does not count
    found = source_weights(for_each, value)
    assert found[2] == 0 and found.sum().item() == pytest.approx(1.0)
    alone = losses.more(
        scores[:2], relevance[:2], cu(0, 2), source=torch.tensor([1]),
        source_weights=torch.tensor([0.0, 1.0]),
    )  # fmt: skip
    torch.testing.assert_close(alone, plain.detach()[:1])


def test_a_step_of_more_lets_no_source_lose():
    """Opposed sources: the mean of the losses makes the small one worse, MORE's step none."""
    features = torch.tensor([[3.0, 1.0], [0, 0], [-1.0, 0.3], [0, 0]], dtype=torch.float64)
    relevance, groups, source = torch.tensor([1.0, 0.0] * 2), cu(0, 2, 4), torch.tensor([0, 1])
    head = torch.zeros(2, dtype=torch.float64)

    def per_source(w):
        return losses.bradley_terry(features @ w, relevance, groups)

    gradients, _ = head_gradients(features, features @ head, relevance, groups, source, 2)
    assert (gradients[0] @ gradients[1]) < 0  # what helps one hurts the other
    step = source_weights(gradients) @ gradients
    before = per_source(head)
    assert (per_source(head - 0.05 * step) < before).all()
    mean = per_source(head - 0.05 * gradients.mean(0))
    assert mean[1] > before[1]


@pytest.mark.parametrize("normalize_by", ["none", "l2", "loss", "loss+"])
def test_normalisers_of_more(normalize_by):
    g = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    value = torch.tensor([0.5, 0.0, 1.5], dtype=torch.float64)
    length = {
        "none": (2.0, 4.0), "l2": (1.0, 1.0), "loss": (2.0 / (1.5 / 4), 4.0 / (2.5 / 4)),
        "loss+": (1 / 0.5, 1 / 1.5),
    }[normalize_by]  # fmt: skip
    a, b = length[0] ** -2, length[1] ** -2  # orthogonal: weights like inverse squares
    got = source_weights(g, value, normalize=normalize_by)
    assert got.tolist() == pytest.approx([a / (a + b), 0.0, b / (a + b)])


def test_more_refuses():
    features, head, relevance, groups, source = reward_batch()
    scores, two = features @ head, torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"'more': source must be integers \[G\] = \[6\]"):
        losses.more(scores, relevance, groups, source=source[:3], source_weights=two)
    with pytest.raises(ValueError, match="source must be integers"):
        losses.more(scores, relevance, groups, source=source.double(), source_weights=two)
    with pytest.raises(ValueError, match=r"features must be \[S, D\] = \[12, D\], got \[3, 2\]"):
        head_gradients(torch.zeros(3, 2), torch.zeros(12), relevance, groups, source, 2)
    with pytest.raises(ValueError, match="source_weights must be a tensor"):
        losses.more(scores, relevance, groups, source=source, source_weights=[0.5, 0.5])
    with pytest.raises(ValueError, match="losses must be"):
        source_weights(torch.ones(2, 3), normalize="loss")
    with pytest.raises(ValueError, match="normalize must be"):
        source_weights(torch.ones(2, 3), normalize="l1")


def test_pal_by_hand():
    """One user between two prototypes: the ideal point is their mean, the nearer answer wins."""
    prototypes = torch.tensor([[0.0, 0.0], [4.0, 0.0]], dtype=torch.float64, requires_grad=True)
    user = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)  # [S, K]
    items = torch.tensor([[2.0, 1.0], [2.0, 3.5]], dtype=torch.float64, requires_grad=True)
    points = ideal_points(prototypes, user)
    assert points.tolist() == [[2.0, 0.0], [2.0, 0.0]]
    scores = ideal_point_scores(items, points)
    assert scores.tolist() == [-1.0, -3.5]
    better = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert losses.pal(scores, better, cu(0, 2)).tolist() == [0.0]  # margin 2.5 > 1
    assert losses.pal(scores, 1 - better, cu(0, 2)).tolist() == [3.5]
    soft = losses.pal(scores, better, cu(0, 2), link="logistic")
    assert soft.item() == pytest.approx(math.log1p(math.exp(-2.5)))
    for grad in torch.autograd.grad(soft.sum(), (prototypes, user, items)):
        assert torch.isfinite(grad).all()
    assert ideal_points(prototypes.expand(2, 2, 2), user).tolist() == points.tolist()
    far = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert bound_penalty(far, upper_bound=4.0, weight=2.0).item() == 2.0


def test_pal_cosine_is_a_two_way_softmax():
    g = torch.Generator().manual_seed(4)
    items, points = (torch.randn(6, 3, generator=g, dtype=torch.float64) for _ in range(2))
    points = points[::2].repeat_interleave(2, 0)  # one user per pair
    scores = ideal_point_scores(items, points, measure="cosine", scale=1 / 0.07)
    got = losses.pal(scores, torch.tensor([1.0, 0.0] * 3), cu(0, 2, 4, 6), link="logistic")
    logits = (normalize(items, dim=-1) * normalize(points, dim=-1)).sum(-1).view(3, 2) / 0.07
    want = cross_entropy(logits, torch.zeros(3, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(got, want)
    at_home = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    ideal_point_scores(at_home, torch.zeros(2, 3).double()).sum().backward()
    assert (at_home.grad == 0).all()


def test_pal_refuses():
    with pytest.raises(ValueError, match="link must be one of"):
        losses.pal(torch.zeros(2), torch.tensor([1.0, 0.0]), cu(0, 2), link="ipo")
    with pytest.raises(ValueError, match="one column per prototype"):
        ideal_points(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="must both be"):
        ideal_point_scores(torch.zeros(3, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="measure must be"):
        ideal_point_scores(torch.zeros(3, 2), torch.zeros(3, 2), measure="l1")


def test_contrast_of_relevant_passages():
    """Two relevant and two irrelevant passages per query, by loops; odd groups beside them."""
    g = torch.Generator().manual_seed(6)
    x = torch.randn(9, 5, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([1.0, 1, 0, 0, 1, 0, math.nan, 1, 1], dtype=torch.float64)
    groups = cu(0, 4, 6, 6, 9)
    loss = sup_con(x, labels, groups, temperature=0.2)
    z = normalize(x, dim=-1)

    def anchor(i, friends, rivals):
        share = [z[i] @ z[p] / 0.2 - torch.logsumexp(z[i] @ z[rivals].T / 0.2, 0) for p in friends]
        return -sum(share) / len(share)

    first = [anchor(i, [i ^ 1], [j for j in range(4) if j != i]) for i in range(4)]
    last = [anchor(7, [8], [8]), anchor(8, [7], [7])]  # no rival but the friend: 0
    want = torch.stack([sum(first) / 4, x.sum() * 0, x.sum() * 0, sum(last) / 2])
    torch.testing.assert_close(loss, want)
    got, right = (torch.autograd.grad(v.sum(), x)[0] for v in (loss, want))
    torch.testing.assert_close(got, right)
    with pytest.raises(ValueError, match="temperature"):
        sup_con(x, labels, groups, temperature=0.0)


def test_points_of_a_two_class_head_are_point_sigmoid():
    """DPA-RAG's pointwise term: a two-class cross-entropy sees the difference of its logits."""
    g = torch.Generator().manual_seed(7)
    logits = torch.randn(4, 2, generator=g, dtype=torch.float64)
    label = torch.tensor([1, 0, 0, 1])
    got = losses.point_sigmoid(logits[:, 1] - logits[:, 0], label.double(), cu(0, 4), beta=1.0)
    assert got.item() / 4 == pytest.approx(cross_entropy(logits, label).item())
    pair = losses.bradley_terry(logits[:2, 1], torch.tensor([1.0, 0.0]).double(), cu(0, 2))
    assert pair.item() == pytest.approx(-logsigmoid(logits[0, 1] - logits[1, 1]).item())
