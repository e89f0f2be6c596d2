"""The limit: the bare matrix products of a step, each by the fastest way torch ships.

Nothing but products on ready operands: no softmax, no gradient of the logits, no casts. Tried for
each product: `mm` (MKL or oneDNN behind torch) and `mkldnn::_linear_pointwise` (oneDNN), whole and
in blocks of vocabulary columns, into reused memory where the call allows it. The winner is chosen
once per run and then timed in every round beside the variants, so that ratios compare like with
like on a machine whose speed moves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case

PRODUCTS = ("forward", "d_hidden", "d_weight")
VOCABULARY_BLOCKS = (1024, 4096)
_TRIALS = 3

Call = Callable[[], object]


class Timed(NamedTuple):
    wall: float  # seconds
    cpu: float  # seconds, all threads


class Winner(NamedTuple):
    how: str  # e.g. "oneDNN, 1024 columns"
    call: Call


def stopwatch(call: Call) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu)


def flops_per_product(case: Case) -> float:
    return 2.0 * case.scored * case.shape.D * case.shape.V


def choose(case: Case) -> dict[str, Winner]:
    """The fastest candidate of each product that the case needs, at its scored rows."""
    n, d, v = case.scored, case.shape.D, case.shape.V
    g = torch.Generator().manual_seed(1)
    h = torch.randn(n, d, generator=g).to(case.torch_dtype)
    w = torch.randn(v, d, generator=g).to(case.torch_dtype)
    dz = torch.randn(n, v, generator=g).to(case.torch_dtype)
    candidates = {
        "forward": _forward(h, w),
        "d_hidden": _d_hidden(dz, w),
        "d_weight": _d_weight(dz, h),
    }
    found = {}
    for product, count in case.products.items():
        if not count:
            continue
        best: tuple[float, Winner] | None = None
        for how, call in candidates[product].items():
            if how.startswith("oneDNN") and not _onednn_serves(case.torch_dtype):
                continue
            call()
            wall = min(stopwatch(call).wall for _ in range(_TRIALS))
            if best is None or wall < best[0]:
                best = wall, Winner(how, call)
        assert best is not None
        found[product] = best[1]
    return found


def _onednn_serves(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _blocks(v: int, width: int) -> list[slice]:
    return [slice(i, min(i + width, v)) for i in range(0, v, width)]


def _forward(h: Tensor, w: Tensor) -> dict[str, Call]:
    n, v = h.shape[0], w.shape[0]
    out = h.new_empty(n, v)
    found: dict[str, Call] = {
        "mm": lambda: torch.mm(h, w.T, out=out),
        "oneDNN": lambda: _linear(h, w),
    }
    for width in (b for b in VOCABULARY_BLOCKS if b < v):
        blocks = _blocks(v, width)
        tile = h.new_empty(n * width)
        tiles = [tile[: n * (b.stop - b.start)].view(n, -1) for b in blocks]

        def by_mm(blocks=blocks, tiles=tiles) -> None:
            for b, t in zip(blocks, tiles, strict=True):
                torch.mm(h, w[b].T, out=t)

        def by_linear(blocks=blocks) -> None:
            for b in blocks:
                _linear(h, w[b])

        found |= {f"mm, {width} columns": by_mm, f"oneDNN, {width} columns": by_linear}
    return found


def _d_hidden(dz: Tensor, w: Tensor) -> dict[str, Call]:
    out = dz.new_empty(dz.shape[0], w.shape[1])
    found: dict[str, Call] = {
        "mm": lambda: torch.mm(dz, w, out=out),
        "oneDNN": lambda: _linear(dz, w.T),
    }
    for width in (b for b in VOCABULARY_BLOCKS if b < w.shape[0]):
        blocks = _blocks(w.shape[0], width)
        # operands as a blocked scheme has them: each tile of dz contiguous
        tiles = [dz[:, b].contiguous() for b in blocks]

        def by_mm(blocks=blocks, tiles=tiles) -> None:
            out.zero_()
            for b, t in zip(blocks, tiles, strict=True):
                torch.addmm(out, t, w[b], out=out)

        found[f"mm, {width} columns"] = by_mm
    return found


def _d_weight(dz: Tensor, h: Tensor) -> dict[str, Call]:
    v = dz.shape[1]
    out = dz.new_empty(v, h.shape[1])
    found: dict[str, Call] = {
        "mm": lambda: torch.mm(dz.T, h, out=out),
        "oneDNN": lambda: _linear(dz.T, h.T),
    }
    for width in (b for b in VOCABULARY_BLOCKS if b < v):
        blocks = _blocks(v, width)
        tiles = [dz[:, b].contiguous() for b in blocks]

        def by_mm(blocks=blocks, tiles=tiles) -> None:
            for b, t in zip(blocks, tiles, strict=True):
                torch.mm(t.T, h, out=out[b])

        def by_linear(tiles=tiles) -> None:
            for t in tiles:
                _linear(t.T, h.T)

        found |= {f"mm, {width} columns": by_mm, f"oneDNN, {width} columns": by_linear}
    return found
