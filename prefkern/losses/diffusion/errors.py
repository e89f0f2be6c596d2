"""Checks and small pieces shared by the diffusion losses.

e is the error of a prediction, reduced over a sample (prefkern.error_sum); delta = e - e_ref is
what the policy does worse than the reference, negative when it does better.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import checks
from .. import core


def change(err: Tensor, ref_err: Tensor, name: str = "err") -> Tensor:  # like err
    """delta = err - ref_err, refusing shapes that would broadcast and references with gradient."""
    for label, value in ((name, err), (f"ref_{name}", ref_err)):
        checks.check_float(label, value)
        if value.dim() == 0:
            raise ValueError(
                f"{label} must hold one error per sample, got a 0-d tensor; reduce over the "
                "elements of a sample only (prefkern.error_sum)."
            )
    if err.shape != ref_err.shape:
        raise ValueError(
            f"{name} and ref_{name} must have one shape, got {list(err.shape)} and "
            f"{list(ref_err.shape)}; reduce both over the same samples."
        )
    checks.check_constant(f"ref_{name}", ref_err)
    return err - ref_err


def gap(
    chosen_err: Tensor, rejected_err: Tensor, ref_chosen_err: Tensor, ref_rejected_err: Tensor
) -> Tensor:  # [P] (or [P, F])
    """Delta = delta_chosen - delta_rejected; negative is good."""
    return core.difference(
        change(chosen_err, ref_chosen_err, "chosen_err"),
        change(rejected_err, ref_rejected_err, "rejected_err"),
    )


def one_per_sample(name: str, err: Tensor) -> None:
    """Refuses errors per segment where a loss reads one number per sample."""
    if err.dim() != 1:
        raise ValueError(
            f"{name} must be [P], one error per sample, got {list(err.shape)}; only dense_dpo and "
            "tlpo read several."
        )


def rewards(err: Tensor, ref_err: Tensor, *, beta: float = 1.0, **_: Any) -> Tensor:  # [P]
    """-beta * delta: the implicit reward of a sample, up to the method's own constant."""
    return -beta * change(err, ref_err)


def error_rewards(err: Tensor, ref_err: Tensor | None = None, **_: Any) -> Tensor:  # [P]
    """-err, for methods that read no reference."""
    checks.check_float("err", err)
    return -err
