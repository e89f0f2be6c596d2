"""Golden vectors of the losses: loading, and running a loss on them the way the objective does.

The supervised terms and reductions are written out here on purpose: tests keep their own copy.
"""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path

import torch

from prefkern import losses
from prefkern.losses.record import Loss
from prefkern.stats import SeqStats

GOLDEN = Path(__file__).resolve().parent / "golden"


@functools.cache
def load(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def pair_cases(families: tuple[str, ...]) -> list[dict]:
    """Cases of pair.json whose loss exists here in one of these families."""
    return [
        c
        for c in load("pair")["cases"]
        if c["loss"] in losses.LOSSES and losses.LOSSES[c["loss"]].family in families
    ]


def tensor(value: object, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def rows(case: dict, prefix: str, dtype: torch.dtype) -> SeqStats:
    """SeqStats of the chosen_, rejected_, gold_, cond_ or unprefixed rows; logp is a leaf."""
    inputs = case["inputs"]
    key = f"{prefix}_" if prefix else ""
    logp = tensor(inputs[f"{key}logps"], dtype).requires_grad_()
    ref, length = inputs.get(f"ref_{key}logps"), inputs.get(f"{key}len")
    return SeqStats(
        logp=logp,
        ref_logp=None if ref is None else tensor(ref, dtype),
        length=torch.ones_like(logp).detach() if length is None else tensor(length, dtype),
        col=_col(case, prefix, dtype),
    )


def _col(case: dict, prefix: str, dtype: torch.dtype) -> torch.Tensor | None:
    """Sum of log sum_v p_v^2, from WPO's mean of log p_y - log sum_v p_v^2."""
    inputs = case["inputs"]
    if f"{prefix}_aligned_mean" not in inputs:
        return None
    total = tensor(inputs[f"{prefix}_aligned_mean"]) * tensor(inputs[f"{prefix}_len"])
    return (tensor(inputs[f"{prefix}_logps"]) - total).to(dtype)


def supervised(seq: SeqStats, mode: str) -> torch.Tensor:
    if mode == "token":
        return -seq.logp.sum() / seq.length.sum().clamp(min=1)
    if mode == "seq":
        return -(seq.logp / seq.length.clamp(min=1)).mean()
    assert mode == "sum"
    return -seq.logp.mean()


def split(record: Loss, case: dict, dtype: torch.dtype) -> dict:
    """Hyper-parameters and data tensors of a case that `record` takes, by name."""
    known = losses.arguments(record)
    found = {k: v for k, v in case["params"].items() if k in known}
    for name, value in case["inputs"].items():
        if name in known and name not in ("label",):
            found[name] = tensor(value, dtype)
    return found


def needs(fn: object, name: str) -> bool:
    return name in inspect.signature(fn).parameters


def assert_close(
    name: str, got: torch.Tensor, want: object, *, relative: float, scale: float | None = None
):
    """|got - want| <= relative * scale, where scale is the largest |want| unless given."""
    want = tensor(want)
    got = got.detach().double()
    assert got.shape == want.shape, (name, got.shape, want.shape)
    assert torch.isfinite(got).all(), f"{name} is not finite: {got}"
    if want.numel() == 0:
        return
    bound = relative * (scale if scale is not None else max(want.abs().max().item(), 1e-300))
    worst = (got - want).abs().max().item()
    assert worst <= bound, (
        f"{name}: off by {worst:.3e}, allowed {bound:.3e}\n got {got}\nwant {want}"
    )
