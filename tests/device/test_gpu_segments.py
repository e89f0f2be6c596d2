"""list_rank, segment_sum and error_sum on a GPU against the eager twin on the CPU in float64."""

from __future__ import annotations

import pytest
import torch
from cases import gpu_backends

from prefkern.backends import choice, list_options
from prefkern.backends.contract import Problem
from prefkern.ops.list_rank import list_rank
from prefkern.ops.segment_sum import segment_sum

BACKENDS = gpu_backends()
pytestmark = pytest.mark.skipif(not BACKENDS, reason="needs a GPU that prefkern's kernels serve")
on_gpu = pytest.mark.parametrize("gpu", BACKENDS or ("none",))


def skip_unless_served(gpu: str, op: str, family: str | None = None) -> None:
    problem = Problem(op, "cuda", torch.float32, family=family)
    if reasons := choice.unsupported(gpu, problem):
        pytest.skip("; ".join(reasons))


def ragged_lists(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0, 1, 2, 31, 32, 33, 64, 5, 1024, 3, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]).int()
    total = int(offsets[-1])
    scores = torch.randn(total, generator=g)
    labels = torch.randint(0, 6, (total,), generator=g).float()
    labels[torch.rand(total, generator=g) < 0.1] = float("nan")
    return scores, labels, offsets


@on_gpu
@pytest.mark.parametrize("family", list_options.FAMILIES)
def test_list_rank(gpu, family):
    skip_unless_served(gpu, "list_rank", family)
    scores, labels, offsets = ragged_lists()
    leaf = scores.cuda().requires_grad_(True)
    found = list_rank(leaf, labels.cuda(), offsets.cuda(), family=family, backend=gpu)
    found.sum().backward()
    truth = scores.double().requires_grad_(True)
    want = list_rank(truth, labels.double(), offsets, family=family, backend="eager")
    want.sum().backward()
    torch.testing.assert_close(found.cpu().double(), want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(leaf.grad.cpu().double(), truth.grad, rtol=2e-4, atol=2e-5)
    again = list_rank(leaf, labels.cuda(), offsets.cuda(), family=family, backend=gpu)
    assert torch.equal(again, found), "a second run gave other bits"


@on_gpu
@pytest.mark.parametrize("weighted", (None, "shared", "each"))
def test_segment_sum(gpu, weighted):
    skip_unless_served(gpu, "segment_sum")
    g = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0, 1, 1000, 7, 40_000, 0, 3])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]).int()
    total = int(offsets[-1])
    values = torch.randn(3, total, generator=g)
    shape = {None: None, "shared": (total,), "each": (3, total)}[weighted]
    weights = None if shape is None else torch.rand(*shape, generator=g)
    upstream = torch.randn(3, len(sizes), generator=g, dtype=torch.float64)

    def run(device: str, name: str):
        x = values.to(device).requires_grad_(True)
        w = None if weights is None else weights.to(device).requires_grad_(True)
        out = segment_sum(x, offsets.to(device), weights=w, backend=name)
        (out * upstream.to(device)).sum().backward()
        return [t.cpu() for t in (out.detach(), x.grad, *(() if w is None else (w.grad,)))]

    for got, want in zip(run("cuda", gpu), run("cpu", "eager"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
