"""Listwise losses against rax, values and gradients, away from ties. Runs where rax is installed.

rax wants padded [G, K] arrays; at exact ties some of its gradients are wrong, so scores differ.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from prefkern import losses

rax = pytest.importorskip("rax", reason="rax is not installed: an optional reference")
jax = pytest.importorskip("jax")
jax.config.update("jax_enable_x64", True)
G, K = 5, 6
SIZES = (6, 2, 4, 5, 3)


def lists():
    """(scores [S] with gradient, relevance [S], cu_groups, padded arrays, mask)."""
    g = torch.Generator().manual_seed(8)
    total = sum(SIZES)
    scores = torch.randn(total, generator=g, dtype=torch.float64).requires_grad_()
    relevance = torch.randint(0, 4, (total,), generator=g).double()
    cu = torch.tensor([0, *np.cumsum(SIZES)], dtype=torch.int32)
    mask = np.arange(K)[None, :] < np.array(SIZES)[:, None]
    return scores, relevance, cu, mask


def padded(values: torch.Tensor, mask: np.ndarray) -> np.ndarray:
    out = np.zeros(mask.shape)
    out[mask] = values.detach().numpy()
    return out


def total(fn, **options):
    """A sum over groups of rax's per-list values; its reductions are the mean over all pairs."""
    return functools.partial(fn, reduce_fn=jax.numpy.sum, **options)


def lambda_weight(**options):
    return functools.partial(rax.dcg_lambdaweight, **options)


# ours, rax's, and what turns rax's number into ours
CASES = {
    "pair_logistic": (
        functools.partial(losses.pair_logistic, beta=1.0), total(rax.pairwise_logistic_loss), 1.0
    ),
    "labeldiff": (
        functools.partial(losses.pair_logistic, beta=1.0, weights="labeldiff"),
        total(rax.pairwise_logistic_loss, lambdaweight_fn=rax.labeldiff_lambdaweight), 1.0,
    ),
    # rax multiplies by the padded list size and takes base-2 discounts
    "lipo": (
        functools.partial(losses.lipo, beta=1.0, log_base="2"),
        total(rax.pairwise_logistic_loss, lambdaweight_fn=lambda_weight()), 1.0 / K,
    ),
    "lipo_normalized": (
        functools.partial(losses.lipo, beta=1.0, log_base="2", normalize=True),
        total(rax.pairwise_logistic_loss, lambdaweight_fn=lambda_weight(normalize=True)), 1.0 / K,
    ),
    "pair_hinge": (
        functools.partial(losses.pair_hinge, beta=1.0), total(rax.pairwise_hinge_loss), 1.0
    ),
    "point_mse": (
        functools.partial(losses.point_mse, beta=1.0), total(rax.pointwise_mse_loss), 1.0
    ),
    "point_sigmoid": (
        functools.partial(losses.point_sigmoid, beta=1.0), total(rax.pointwise_sigmoid_loss), 1.0
    ),
    "list_mle": (functools.partial(losses.list_mle, beta=1.0), total(rax.listmle_loss), 1.0),
    "softmax": (
        functools.partial(losses.softmax, beta=1.0, target="none"), total(rax.softmax_loss), 1.0
    ),
    "approx_ndcg": (
        functools.partial(losses.approx_ndcg, beta=1.0, temperature=1.0),
        total(rax.ndcg_metric, rank_fn=rax.utils.approx_ranks), -1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    ours, theirs, factor = CASES[name]
    scores, relevance, cu, mask = lists()
    loss = ours(scores, relevance, cu).sum()
    (grad,) = torch.autograd.grad(loss, scores)

    def call(values):
        return theirs(values, jax.numpy.asarray(padded(relevance, mask)), where=mask)

    value, slope = jax.value_and_grad(call)(jax.numpy.asarray(padded(scores, mask)))
    assert loss.item() == pytest.approx(float(value) * factor, rel=1e-10)
    np.testing.assert_allclose(grad.numpy(), np.asarray(slope)[mask] * factor, atol=1e-10)
