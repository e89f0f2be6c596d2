"""Head shapes and steps timed on a GPU, their inputs and their float64 truth.

Shapes: N scored tokens, V vocabulary, D hidden size. A step is the forward of some statistics, a
fixed random number per token and statistic as upstream gradient, and the backward, so that every
variant computes the same thing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STATS = {"logp": ("logp",), "tdpo": ("logp", "ref_logp", "fkl")}


@dataclass(frozen=True)
class Head:
    """A model's head."""

    model: str
    D: int
    V: int


QWEN_SMALL = Head("Qwen2.5-0.5B", 896, 151_936)
QWEN = Head("Qwen2.5-7B", 3584, 152_064)
LLAMA = Head("Llama-3-8B", 4096, 128_256)
GEMMA = Head("Gemma-2B", 2048, 256_000)
# The shape whose times others have published, and which the targets are stated for.
TARGET = Head("target", 4096, 152_064)
TINY = Head("tiny", 24, 67)


@dataclass(frozen=True)
class Case:
    """One row group of the end-to-end table."""

    head: Head
    N: int
    step: str = "logp"
    frozen: bool = False  # no gradient for the head
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        kind = "frozen" if self.frozen else "trainable"
        return f"{self.step}-{kind}-{self.head.model}-N{self.N}"

    @property
    def models(self) -> int:
        return 2 if self.step == "tdpo" else 1

    @property
    def flops_per_product(self) -> float:
        return 2.0 * self.N * self.head.V * self.head.D

    @property
    def gradient_bytes(self) -> int:
        rows = self.N + (0 if self.frozen else self.head.V)
        return rows * self.head.D * self.dtype.itemsize


# Most telling first: a run that is out of time leaves out the end of the list.
CASES = (
    Case(TARGET, 8192),
    Case(TARGET, 8192, "tdpo"),
    Case(TARGET, 8192, frozen=True),
    Case(QWEN_SMALL, 8192),
    Case(LLAMA, 8192),
    Case(GEMMA, 8192),
    Case(QWEN, 16384),
    Case(LLAMA, 2048),
    Case(QWEN_SMALL, 65536),
    Case(LLAMA, 8192, "tdpo"),
    Case(LLAMA, 8192, frozen=True),
    Case(LLAMA, 8192, "tdpo", frozen=True),
)
TINY_CASES = (Case(TINY, 12), Case(TINY, 12, "tdpo"), Case(TINY, 12, frozen=True))


@dataclass
class Inputs:
    """Tensors of one case; gradients are on hidden and, unless frozen, weight."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    ref_hidden: Tensor  # [N, D]
    ref_weight: Tensor  # [V, D]
    upstream: dict[str, Tensor]  # statistic -> [N]

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Logits of standard deviation 2; every second token leans to its target, as a trained model
    does; the reference is the policy moved by 5 %."""
    g = torch.Generator(device).manual_seed(seed)
    n, v, d = case.N, case.head.V, case.head.D

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    hidden, weight = draw(n, d), draw(v, d) * (2.0 * d**-0.5)
    targets = torch.randint(0, v, (n,), generator=g, device=device)
    hidden[::2] += weight[targets[::2]]
    ref_hidden, ref_weight = hidden + 0.05 * draw(n, d), weight + draw(v, d) * (0.1 * d**-0.5)
    return Inputs(
        hidden.to(case.dtype).requires_grad_(True),
        weight.to(case.dtype).requires_grad_(not case.frozen),
        targets,
        ref_hidden.to(case.dtype),
        ref_weight.to(case.dtype),
        {s: draw(n) for s in STATS[case.step] if s != "ref_logp"},
    )


@dataclass
class Truth:
    """Float64 values of every token and gradients of sampled rows and columns."""

    values: dict[str, Tensor]  # statistic -> [N]
    rows: Tensor  # [k] sampled tokens
    d_hidden: Tensor  # [k, D]
    columns: Tensor  # [k] sampled vocabulary entries
    d_weight: Tensor | None  # [k, D]


def make_truth(case: Case, x: Inputs, samples: int = 64, width: int = 4096) -> Truth:
    """Two float64 sweeps over the vocabulary, `width` entries at a time: normalisers, then sums."""
    h, hr = x.hidden.detach().double(), x.ref_hidden.double()
    two = case.models == 2
    n, v = case.N, case.head.V
    starts = range(0, v, width)

    def logits(v0: int) -> tuple[Tensor, Tensor | None]:
        z = h @ x.weight.detach()[v0 : v0 + width].double().T
        return z, hr @ x.ref_weight[v0 : v0 + width].double().T if two else None

    minus = torch.full((n,), -torch.inf, dtype=torch.float64, device=h.device)
    lse, ref_lse = minus, minus.clone()
    for v0 in starts:
        z, zr = logits(v0)
        lse = torch.logaddexp(lse, z.logsumexp(1))
        ref_lse = ref_lse if zr is None else torch.logaddexp(ref_lse, zr.logsumexp(1))

    def at_targets(a: Tensor, w: Tensor) -> Tensor:
        return torch.cat(
            [(a[i : i + 512] * w[x.targets[i : i + 512]].double()).sum(1) for i in range(0, n, 512)]
        )

    values = {"logp": at_targets(h, x.weight.detach()) - lse}
    if two:
        values["ref_logp"] = at_targets(hr, x.ref_weight) - ref_lse
        values["fkl"] = torch.zeros_like(lse)
    pick = torch.Generator(h.device).manual_seed(1)
    rows = torch.randperm(n, generator=pick, device=h.device)[:samples]
    columns = torch.randint(0, v, (samples,), generator=pick, device=h.device)
    half = min(samples // 2, len(rows))  # half of them targets: their gradient has a one-hot part
    columns[:half] = x.targets[rows[:half]]
    d_hidden = torch.zeros(len(rows), case.head.D, dtype=torch.float64, device=h.device)
    d_weight = torch.zeros(len(columns), case.head.D, dtype=torch.float64, device=h.device)
    c = {s: u.double() for s, u in x.upstream.items()}
    for v0 in starts:
        z, zr = logits(v0)
        w = x.weight.detach()[v0 : v0 + width].double()
        p = (z - lse[:, None]).exp()
        dz = -c["logp"][:, None] * p
        here = x.targets - v0
        inside = (here >= 0) & (here < z.shape[1])
        index = torch.arange(n, device=h.device)[inside]
        dz[index, here[inside]] += c["logp"][inside]
        if zr is not None:
            log_r = zr - ref_lse[:, None]
            r = log_r.exp()
            values["fkl"] += (r * (log_r - (z - lse[:, None]))).sum(1)
            dz += c["fkl"][:, None] * (p - r)
        d_hidden += dz[rows] @ w
        mine = (columns >= v0) & (columns < v0 + z.shape[1])
        d_weight[mine] = dz[:, columns[mine] - v0].T @ h
    return Truth(values, rows, d_hidden, columns, None if case.frozen else d_weight)


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; inf for anything that is not a number."""
    got = got.double()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - want).norm() / want.norm())
