"""The limit: the bare matrix products of a step, each by the fastest way torch ships.

Nothing but products on ready operands: no softmax, no gradient of the logits, no casts. Tried for
each product: `mm` (the vendor library behind torch) and on a CPU `mkldnn::_linear_pointwise`
(oneDNN), whole and in blocks of vocabulary columns, into reused memory where the call allows it.
The winner is chosen once per run and then timed in every round beside the variants, so that ratios
compare like with like on a machine whose speed moves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case
from .timing import Call, Cpu

# A GPU needs wide tiles to be filled.
BLOCKS = {"cpu": (1024, 4096), "cuda": (8192, 16384)}
WHOLE_BYTES = 8 << 30  # of all logits at once: above, blocks alone are tried
_TRIALS = 3


class Winner(NamedTuple):
    how: str  # e.g. "oneDNN, 1024 columns"
    call: Call


def choose(case: Case, device: Cpu) -> dict[str, Winner]:
    """The fastest candidate of each product that the case needs, at its scored rows."""
    g = torch.Generator(device.tensors).manual_seed(1)

    def draw(rows: int, columns: int) -> Tensor:
        x = torch.empty(rows, columns, dtype=case.torch_dtype, device=device.tensors)
        return x.normal_(generator=g)

    n, d, v = case.scored, case.shape.D, case.shape.V
    blocks = BLOCKS[device.kind]
    whole = v <= min(blocks) or n * v * case.torch_dtype.itemsize < WHOLE_BYTES
    operands = draw(n, d), draw(v, d), draw(n, v if whole else max(blocks))
    found = {}
    for product, count in case.products.items():
        timed = {}
        for how, call in candidates(product, *operands, blocks).items() if count else ():
            if how.startswith("oneDNN") and not _onednn_serves(case.torch_dtype, device):
                continue
            call()
            timed[min(device.seconds(call) for _ in range(_TRIALS))] = Winner(how, call)
        if timed:
            found[product] = timed[min(timed)]
    return found


def _onednn_serves(dtype: torch.dtype, device: Cpu) -> bool:
    if device.kind != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _linear(x: Tensor, y: Tensor) -> Tensor:
    """x @ y by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, y.T, None, "none", [], "")


def candidates(
    product: str, h: Tensor, w: Tensor, dz: Tensor, widths: tuple[int, ...]
) -> dict[str, Call]:
    """How -> call, of h @ w.T, dz @ w or dz.T @ h. Where dz has fewer columns than w has rows, the
    logits do not exist at once and only blocks are tried."""
    n, v = h.shape[0], w.shape[0]
    whole = dz.shape[1] == v
    left, right, like = {
        "forward": (h, w.T, dz), "d_hidden": (dz, w, h), "d_weight": (dz.T, h, w),
    }[product]  # fmt: skip
    out = torch.empty_like(like)
    found: dict[str, Call] = {}
    if whole:
        found["mm"] = lambda: torch.mm(left, right, out=out)
        found["oneDNN"] = lambda: _linear(left, right)
    for width in (b for b in widths if b < v):
        spans = [slice(i, min(i + width, v)) for i in range(0, v, width)]
        flat = dz.flatten()
        # Tiles are contiguous, as a blocked scheme has them: written or read in the same memory, or
        # cut out of the logits, which a CPU's cache would hold otherwise.
        tiles = [flat[: n * (s.stop - s.start)].view(n, -1) for s in spans]
        if product == "forward":
            steps = [(h, w[s].T, t) for s, t in zip(spans, tiles, strict=True)]
        else:
            if whole and not dz.is_cuda:
                tiles = [dz[:, s].contiguous() for s in spans]
            steps = [
                (t, w[s], out) if product == "d_hidden" else (t.T, h, out[s])
                for s, t in zip(spans, tiles, strict=True)
            ]

        def by_mm(steps=steps) -> None:
            for i, (x, y, o) in enumerate(steps):
                if product == "d_hidden":
                    torch.addmm(o, x, y, beta=float(i > 0), out=o)
                else:
                    torch.mm(x, y, out=o)

        def by_linear(steps=steps) -> None:
            for x, y, _ in steps:
                _linear(x, y)

        found[f"mm, {width} columns"] = by_mm
        if product != "d_hidden":  # oneDNN does not add to a result
            found[f"oneDNN, {width} columns"] = by_linear
    return found
