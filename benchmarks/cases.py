"""What is measured: one Case is a training step at a shape, a dtype and a thread count.

Shapes: S sequences (chosen first, then rejected), T tokens each, N = S * T, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import shapes
from .shapes import Shape

BETA, ALPHA = 0.1, 0.5  # of DPO and TDPO
STEPS = ("dpo", "tdpo2", "fkl", "rkl", "jsd")
IGNORE = -100
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """A step: reference forward without gradient, policy forward, backward.

    dpo    log-probabilities of both models, sigmoid loss
    tdpo2  the same plus KL(reference || policy) of every token
    fkl, rkl, jsd  mean over tokens of KL(r || p), KL(p || r), Jensen-Shannon at 0.5
    """

    name: str
    step: str
    shape: Shape = shapes.BASE
    dtype: str = "float32"
    threads: int = 1
    frozen: bool = False  # no gradient for the head
    masked: bool = False  # the first half of every answer is ignored
    why: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def scored(self) -> int:
        """Rows that must be computed."""
        half = self.shape.tokens // 2 if self.masked else 0
        return 2 * self.shape.pairs * (self.shape.tokens - half)

    @property
    def products(self) -> dict[str, int]:
        """The matrix products that no scheme avoids when every logit is kept for the backward."""
        return {"forward": 2, "d_hidden": 1, "d_weight": 0 if self.frozen else 1}

    @property
    def backward_heads(self) -> int:
        """Heads whose logits the backward reads."""
        return 1 if self.step == "dpo" else 2

    @property
    def gradient_bytes(self) -> int:
        rows = self.shape.N + (0 if self.frozen else self.shape.V)
        return rows * self.shape.D * self.torch_dtype.itemsize

    def resized(self, size: str) -> Case:
        return Case(**{**self.__dict__, "shape": shapes.reduced(self.shape, size)})


def _rows() -> list[Case]:
    rows = []
    for threads in (2, 1):
        rows += [
            Case(f"dpo-fp32-t{threads}", "dpo", threads=threads, why="trainable head"),
            Case(
                f"tdpo-fp32-t{threads}", "tdpo2", threads=threads, why="logp of both models and KL"
            ),
        ]
    rows += [
        Case("dpo-bf16-t1", "dpo", dtype="bfloat16", why="trainable head, bf16"),
        Case("dpo-frozen-t1", "dpo", frozen=True, why="frozen head (LoRA)"),
        Case("dpo-masked-t1", "dpo", masked=True, why="half the rows ignored"),
        Case("dpo-long-t1", "dpo", shape=shapes.LONG_PAIR, why="one pair of 1024 tokens"),
        Case("dpo-vocab-t1", "dpo", shape=shapes.LARGE_VOCABULARY, why="Llama 3 vocabulary"),
        Case("tdpo-bf16-t1", "tdpo2", dtype="bfloat16", why="logp and KL, bf16"),
        Case("fkl-fp32-t1", "fkl", why="KL(reference || policy)"),
        Case("rkl-fp32-t1", "rkl", why="KL(policy || reference)"),
        Case("jsd-fp32-t1", "jsd", why="Jensen-Shannon, two normalisers"),
    ]
    return rows


CASES: dict[str, Case] = {case.name: case for case in _rows()}


@dataclass(frozen=True)
class Inputs:
    """Identical, seeded inputs of every variant; sequences are [chosen..., rejected...]."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    ref_hidden: Tensor  # [N, D]
    ref_weight: Tensor  # [V, D]
    cu_seqlens: Tensor  # [S+1]
    S: int
    T: int

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Logits of standard deviation 2; the reference is the policy moved by 5 %."""
    g = torch.Generator().manual_seed(seed)
    shape = case.shape
    sequences = 2 * shape.pairs

    def draw(rows: int, scale: float) -> Tensor:
        return torch.randn(rows, shape.D, generator=g) * scale

    hidden, weight = draw(shape.N, 1.0), draw(shape.V, 2.0 * shape.D**-0.5)
    ref_hidden = hidden + draw(shape.N, 0.05)
    ref_weight = weight + draw(shape.V, 0.1 * shape.D**-0.5)
    targets = torch.randint(0, shape.V, (sequences, shape.tokens), generator=g)
    if case.masked:
        targets[:, : shape.tokens // 2] = IGNORE
    cast = case.torch_dtype
    return Inputs(
        hidden=hidden.to(cast).requires_grad_(True),
        weight=weight.to(cast).requires_grad_(not case.frozen),
        targets=targets.reshape(-1),
        ref_hidden=ref_hidden.to(cast),
        ref_weight=ref_weight.to(cast),
        cu_seqlens=torch.arange(sequences + 1, dtype=torch.int32) * shape.tokens,
        S=sequences,
        T=shape.tokens,
    )
