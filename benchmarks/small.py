"""Every kernel once on small ragged inputs, each value and gradient against float64: the first
thing to run on a GPU, and what a memory checker is run over.

`compute-sanitizer --tool memcheck python -m benchmarks.small cuda`

The truth is the eager backend in float64 on the same device, which the tests hold to oracles.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import prefkern
from prefkern.backends import list_options
from prefkern.ops.error_sum import error_sum
from prefkern.ops.list_rank import list_rank
from prefkern.ops.segment_sum import segment_sum

from . import inside
from .oracle import relative_error
from .results import Row

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ONE_MODEL = ("logp", "lse", "zy", "ent", "col", "zmean")
TWO_MODEL = (
    "logp", "ref_logp", "ref_lse", "fkl", "rkl", "jsd:0.3", "alpha:0.4", "renyi:0.6", "tv",
    "mix:0.25", "ev",
)  # fmt: skip
# top1 and the top set of bkl are decided by rounding where two logits are close, which 16 bits are
EXACT = {ONE_MODEL: (*ONE_MODEL, "top1"), TWO_MODEL: (*TWO_MODEL, "bkl:3")}
BOUND = {BF16: 2e-2, FP16: 4e-3, FP32: 2e-4, FP64: 1e-9}

Draw = Callable[..., Tensor]  # normal numbers of a shape
Tensors = list[Tensor]


class Check(NamedTuple):
    """One call at one dtype; `run(draw, backend)` gives values and the leaves of their backward."""

    name: str
    op: str
    dtype: torch.dtype
    run: Callable[[Draw, str], tuple[Tensors, Tensors]]

    def row(self, backend: str, device: str) -> Row:
        """The largest relative errors of values and gradients."""
        both = zip(
            self.results(backend, device, self.dtype), self.results("eager", device, FP64),
            strict=True,
        )  # fmt: skip
        found = [
            max(relative_error(a, b) for a, b in zip(got, want, strict=True)) for got, want in both
        ]
        ok = all(error <= BOUND[self.dtype] for error in found)
        return {
            "status": "ok" if ok else "wrong", "err_values": found[0], "err_gradients": found[1],
            "reason": "" if ok else f"above {BOUND[self.dtype]:g}",
        }  # fmt: skip

    def results(self, backend: str, device: str, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
        """(values, gradients), from the same numbers (which self.dtype can hold) in any dtype."""
        g = torch.Generator().manual_seed(1)
        held = FP32 if self.dtype == FP64 else self.dtype
        values, leaves = self.run(
            lambda *shape: torch.randn(*shape, generator=g).to(held).to(device, dtype), backend
        )
        live = [v for v in values if v.requires_grad]
        g.manual_seed(2)
        up = [torch.randn(v.shape, generator=g, dtype=FP64).to(device, v.dtype) for v in live]
        return [v.detach() for v in values], list(torch.autograd.grad(live, leaves, up))


def _leaves(*tensors: Tensor) -> Tensors:
    return [t.requires_grad_(True) for t in tensors]


def head_run(y: Tensor, stats: tuple[str, ...], budget: int | None, frozen: bool):
    n = y.shape[0]

    def run(draw: Draw, backend: str) -> tuple[Tensors, Tensors]:
        h, w, rh, rw = draw(n, 24), draw(131, 24), draw(n, 24), draw(131, 24)
        leaves = _leaves(h) if frozen else _leaves(h, w)
        options = {"stats": stats, "backend": backend, "memory_budget": budget}
        if "ev" in stats:
            options["values"] = draw(131).to(torch.promote_types(h.dtype, FP32))
        if "ref_logp" in stats:
            found = prefkern.linear_divergence(h, w, y, rh, rw, **options)
        else:
            found = prefkern.linear_logps(h, w, y, **options)
        return [getattr(found, s.partition(":")[0]) for s in stats], leaves

    return run


def checks(device: str, gpu: bool) -> Iterator[Check]:
    """Of every op: plain and frozen heads, both budgets, every family, fp64 where it is served.
    Without a GPU (interpreter) one dtype and budget: it takes seconds for what a GPU does at once.
    """
    many_y = torch.randint(0, 131, (200,), generator=torch.Generator().manual_seed(0))
    many_y[::5] = -100
    many_y = many_y.to(device)
    y = many_y[:37]
    kinds = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}

    def logits(draw: Draw, backend: str) -> tuple[Tensors, Tensors]:
        (z,), zr = _leaves(draw(37, 131)), draw(37, 131)
        stats = ("logp", "fkl", "tv")
        found = prefkern.logits_logps(z, y, ref_logits=zr, stats=stats, backend=backend)
        return [found.logp, found.fkl, found.tv], [z]

    ops = {ONE_MODEL: "linear_logps", TWO_MODEL: "linear_divergence"}
    for dtype in (BF16, FP16, FP32) if gpu else (BF16,):
        for every, op in ops.items():
            few = ("logp", "ref_logp", "fkl") if every == TWO_MODEL else ("logp",)
            frozen = (*few, "rkl") if every == TWO_MODEL else ("logp", "ent")
            stats = EXACT[every] if dtype == FP32 else every
            for budget in (0, None) if gpu else (None,):
                for some in (stats, few):
                    name = f"{op} {len(some)} statistics {kinds[dtype]} budget {budget}"
                    yield Check(name, op, dtype, head_run(y, some, budget, False))
            # few rows take other kernels than many
            for some, rows in ((frozen, y), (few, many_y)):
                name = f"{op} frozen {len(some)} statistics {kinds[dtype]}"
                yield Check(name, op, dtype, head_run(rows, some, None, True))
        yield Check(f"logits_logps {kinds[dtype]}", "logits_logps", dtype, logits)

    # long lists and segments where they are cheap; the last one is empty
    sizes = [0, 1, 5, 34, 57, *([31, 32, 33, 1024] if gpu else []), 0]
    many = [*sizes, 40_000] if gpu else sizes
    groups, offsets = (
        torch.tensor([0, *itertools.accumulate(s)], dtype=torch.int32, device=device)
        for s in (sizes, many)
    )
    frames = torch.tensor([0, 0, 1, 2, -1, 2, 2], device=device)

    def sums(draw: Draw, backend: str) -> tuple[Tensors, Tensors]:
        values, weights = _leaves(draw(3, sum(many)), draw(sum(many)))
        return [segment_sum(values, offsets, weights=weights, backend=backend)], [values, weights]

    for dtype in (FP32, FP64):
        for family in list_options.FAMILIES:

            def lists(draw: Draw, backend: str, family=family) -> tuple[Tensors, Tensors]:
                (scores,), labels = _leaves(draw(sum(sizes))), draw(sum(sizes)).round()
                labels[::10] = torch.nan
                found = list_rank(scores, labels, groups, family=family, backend=backend)
                return [found], [scores]

            yield Check(f"list_rank {family} {kinds[dtype]}", "list_rank", dtype, lists)
        yield Check(f"segment_sum {kinds[dtype]}", "segment_sum", dtype, sums)
        for cut in ({}, {"segments": frames, "num_segments": 3}):

            def squares(draw: Draw, backend: str, cut=cut) -> tuple[Tensors, Tensors]:
                (p,), t, q = _leaves(draw(3, 7, 50)), draw(3, 7, 50), draw(3, 7, 50)
                stats = ("err", "ref_err", "dot", "huber:0.5")
                return list(error_sum(p, t, q, stats=stats, backend=backend, **cut)), [p]

            name = f"error_sum {'segments' if cut else 'whole'} {kinds[dtype]}"
            yield Check(name, "error_sum", dtype, squares)


def run(
    backend: str,
    device: str,
    trying: Callable[[str], bool] = lambda name: True,
    light: bool = False,
) -> Iterator[tuple[str, Row]]:
    """(name, row) of every check that the backend serves; a row lists the kernels it launched."""
    for check in checks(device, gpu=device == "cuda" and not light):
        name = f"{backend} {check.name}"
        off = inside.reasons(backend, check.op, device, check.dtype)
        if off or not trying(name):
            continue
        before = {backend: inside.launched(backend)}
        try:
            row = check.row(backend, device)
        except Exception as error:
            row = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
        after = {backend: inside.launched(backend)}
        yield name, row | {"launched": inside.newly_launched(before, after)}


def main(backend: str, device: str = "cuda", light: str = "") -> int:
    bad = 0
    for name, row in run(backend, device, light=bool(light)):
        bad += row["status"] != "ok"
        print(name, row["status"], row["reason"], flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
