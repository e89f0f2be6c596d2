"""What is measured: one Case is a training step at a shape and a dtype, on a CPU or a GPU.

Shapes: S sequences (chosen first, then rejected), T tokens each, N = S * T, V vocabulary, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import mixture

BETA, ALPHA = 0.1, 0.5  # of DPO and TDPO
IGNORE = -100
MIB = 1 << 20
# step -> the statistics of a token that its loss is made of. `logp`, `ent`, `tdpo`: their sum with
# fixed random weights, which is all a kernel sees of any loss; the others are losses:
#   ce     mean of -logp, which other libraries have a faster way for than for its parts
#   dpo    sigmoid loss on log-probabilities of both models     tdpo2  the same and KL(r || p)
#   fkl, rkl, jsd  mean over tokens of KL(r || p), KL(p || r), Jensen-Shannon at 0.5
#   trl    dpo inside TRL's trainer (trl_step.py)
NEEDS: dict[str, tuple[str, ...]] = {
    "logp": ("logp",), "ent": ("logp", "ent"), "ce": ("logp",), "tdpo": ("logp", "ref_logp", "fkl"),
    "dpo": ("logp", "ref_logp"), "tdpo2": ("logp", "ref_logp", "fkl"), "fkl": ("fkl",),
    "rkl": ("rkl",), "jsd": ("jsd",), "trl": (),
}  # fmt: skip


class Shape(NamedTuple):
    """A batch of preference pairs: 2 * pairs answers of `tokens` tokens each."""

    pairs: int
    tokens: int
    D: int
    V: int
    model: str = ""  # whose head it is

    @property
    def N(self) -> int:
        return 2 * self.pairs * self.tokens


# The shape at which the peers were surveyed: logits are 250 MiB in fp32, the head 62.5 MiB.
BASE = Shape(4, 256, 512, 32_000)
# Same N in one pair: whoever chunks by pairs holds everything at once.
LONG_PAIR = Shape(1, 1024, 512, 32_000)
# Llama 3's vocabulary: V / D = 125, where chunk sizes derived from N * D / V fall to a few rows.
LARGE_VOCABULARY = Shape(2, 128, 1024, 128_256)
# Heads of GPU cases: 16 pairs are N = 8192. The first is the shape that others publish times for.
TARGET = Shape(16, 256, 4096, 152_064, "target")
QWEN_SMALL = Shape(16, 256, 896, 151_936, "Qwen2.5-0.5B")
QWEN = Shape(32, 256, 3584, 152_064, "Qwen2.5-7B")
LLAMA = Shape(16, 256, 4096, 128_256, "Llama-3-8B")
GEMMA = Shape(16, 256, 2048, 256_000, "Gemma-2B")
# What stands in at other sizes: 1/32 of the work, and smoke tests ragged against every tile.
STAND_INS = {"quick": Shape(4, 64, 256, 8000), "tiny": Shape(2, 9, 20, 131)}


@dataclass(frozen=True)
class Case:
    """A step: reference forward without gradient (if two models), policy forward, backward."""

    name: str
    step: str
    shape: Shape = BASE
    dtype: str = "float32"
    threads: int = 1  # of a CPU
    frozen: bool = False  # no gradient for the head
    masked: bool = False  # the first half of every answer is ignored
    keep_memory: bool = True  # freed memory stays with the process that takes times
    share: float | None = None  # rows mixed so that this share of units is needed (mixture.py)
    why: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def scored(self) -> int:
        """Rows that must be computed."""
        tokens = self.shape.tokens
        left_out = tokens // 3 if self.step == "trl" else tokens // 2 if self.masked else 0
        return 2 * self.shape.pairs * (tokens - left_out)

    @property
    def models(self) -> int:
        return 1 if self.step in ("logp", "ent", "ce") else 2

    @property
    def products(self) -> dict[str, int]:
        """The matrix products that no scheme avoids when every logit is kept for the backward."""
        return {"forward": self.models, "d_hidden": 1, "d_weight": 0 if self.frozen else 1}

    @property
    def flops_per_product(self) -> float:
        return 2.0 * self.scored * self.shape.D * self.shape.V

    @property
    def backward_heads(self) -> int:
        """Heads whose logits the backward reads."""
        return 1 if self.step in ("logp", "ent", "ce", "dpo") else 2

    def resized(self, size: str) -> Case:
        """The stand-in at size "quick" or "tiny"; "full" is the case itself."""
        if size == "full":
            return self
        shape = STAND_INS[size]
        if self.shape.pairs == 1:
            shape = shape._replace(pairs=1, tokens=shape.pairs * shape.tokens)
        return replace(self, shape=shape)


def gpu_case(shape: Shape, step: str = "logp", frozen: bool = False, pairs: int = 0) -> Case:
    shape = shape._replace(pairs=pairs or shape.pairs)
    kind = "frozen" if frozen else "trainable"
    name = f"{step}-{kind}-{shape.model}-N{shape.N}"
    return Case(name, step, shape, "bfloat16", frozen=frozen, why=f"head of {shape.model}")


# Most telling first: a run that is out of time leaves out the end of the list.
_GPU_CASES = (
    gpu_case(TARGET),
    gpu_case(TARGET, "tdpo"),
    gpu_case(TARGET, frozen=True),
    gpu_case(QWEN_SMALL),
    gpu_case(TARGET, "ent"),
    gpu_case(TARGET, "ce"),
    gpu_case(LLAMA),
    gpu_case(GEMMA),
    gpu_case(QWEN),
    gpu_case(LLAMA, pairs=4),
    gpu_case(QWEN_SMALL, pairs=128),
    gpu_case(LLAMA, "tdpo"),
    gpu_case(LLAMA, frozen=True),
    gpu_case(LLAMA, "tdpo", frozen=True),
    replace(gpu_case(TARGET), name="logp-tail-0.15-target-N8192", share=0.15),
)

GPU_FIRST = _GPU_CASES[:5]  # those that a prediction is kept for


# group -> its cases; `cpu` and `gpu` are what a run without --cases measures
_GROUPS = {
    "cpu": (
        *(
            case for t in (2, 1) for case in (
                Case(f"dpo-fp32-t{t}", "dpo", threads=t, why="trainable head"),
                Case(f"tdpo-fp32-t{t}", "tdpo2", threads=t, why="logp of both models and KL"),
            )
        ),
        Case("dpo-bf16-t1", "dpo", dtype="bfloat16", why="trainable head, bf16"),
        Case("dpo-frozen-t1", "dpo", frozen=True, why="frozen head (LoRA)"),
        Case("dpo-masked-t1", "dpo", masked=True, why="half the rows ignored"),
        Case("dpo-long-t1", "dpo", LONG_PAIR, why="one pair of 1024 tokens"),
        Case("dpo-vocab-t1", "dpo", LARGE_VOCABULARY, why="Llama 3 vocabulary"),
        Case("tdpo-bf16-t1", "tdpo2", dtype="bfloat16", why="logp and KL, bf16"),
        Case("fkl-fp32-t1", "fkl", why="KL(reference || policy)"),
        Case("rkl-fp32-t1", "rkl", why="KL(policy || reference)"),
        Case("jsd-fp32-t1", "jsd", why="Jensen-Shannon, two normalisers"),
    ),
    "gpu": _GPU_CASES,
    # shares of the units that a backward with tail_mass needs; "tail" is DPO at two vocabularies,
    # "tail-more" the other steps whose backward it shortens
    "tail": tuple(
        Case(f"tail-{share:g}-{kind}", "dpo", shape, dtype, share=share, why=f"{share:g} needed")
        for kind, shape, dtype in (
            ("32k", BASE, "float32"), ("32k-bf16", BASE, "bfloat16"),
            ("152k", Shape(2, 128, 512, 152_064), "float32"),
            ("152k-bf16", Shape(2, 128, 512, 152_064), "bfloat16"),
        )
        for share in mixture.SHARES
    ),
    "tail-more": tuple(
        Case(
            f"tail-{share:g}-{kind}-{short}", step, BASE, dtype, share=share, frozen=frozen,
            why=f"{share:g} needed, {kind}",
        )
        for kind, step, frozen in (
            ("tdpo", "tdpo2", False), ("frozen", "dpo", True), ("alone", "logp", False)
        )
        for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16"))
        for share in mixture.SHARES
    ),
    # D is the width of a model of two layers
    "trl": tuple(
        Case(f"trl-{kind}{name}", "trl", BASE._replace(V=v), keep_memory=kept, why=why)
        for kind, v in (("32k", 32_000), ("152k", 151_936))
        for name, kept, why in (
            ("", False, "a DPO step inside TRL, glibc's defaults"),
            ("-kept", True, "a DPO step inside TRL, freed memory stays with the process"),
        )
    ),
}  # fmt: skip
GROUPS = {name: {case.name: case for case in cases} for name, cases in _GROUPS.items()}
CASES: dict[str, Case] = {name: case for group in GROUPS.values() for name, case in group.items()}


@dataclass
class Inputs:
    """Identical, seeded inputs of every variant; sequences are [chosen..., rejected...]."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    ref_hidden: Tensor  # [N, D]
    ref_weight: Tensor  # [V, D]
    cu_seqlens: Tensor  # [S+1]
    upstream: dict[str, Tensor]  # statistic -> [N], weights of logp, ent and tdpo
    S: int
    T: int

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What the backward fills."""
        found = {"d_hidden": self.hidden, "d_weight": self.weight}
        return {name: x for name, x in found.items() if x.requires_grad}

    @property
    def gradient_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.leaves.values())

    def clear(self) -> None:
        for x in self.leaves.values():
            x.grad = None


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Logits of standard deviation 2; every second token leans to its target, as a trained model
    does (or rows are mixed, see mixture.py); the reference is the policy moved by 5 %."""
    g = torch.Generator(device).manual_seed(seed)
    shape, cast = case.shape, case.torch_dtype

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device)

    weight = draw(shape.V, shape.D) * (2.0 * shape.D**-0.5)
    if case.share is None:
        hidden = draw(shape.N, shape.D)
        targets = torch.randint(0, shape.V, (shape.N,), generator=g, device=device)
        hidden[::2] += weight[targets[::2]]
    else:
        hidden, targets = mixture.rows(weight, shape.N, case.share, g)
    ref_hidden = (hidden + 0.05 * draw(shape.N, shape.D)).to(cast)
    ref_weight = (weight + draw(shape.V, shape.D) * (0.1 * shape.D**-0.5)).to(cast)
    if case.masked:
        targets.view(-1, shape.tokens)[:, : shape.tokens // 2] = IGNORE
    return Inputs(
        hidden.to(cast).requires_grad_(True),
        weight.to(cast).requires_grad_(not case.frozen),
        targets,
        ref_hidden,
        ref_weight,
        torch.arange(2 * shape.pairs + 1, dtype=torch.int32, device=device) * shape.tokens,
        {s: draw(shape.N) for s in NEEDS[case.step] if s != "ref_logp"},
        2 * shape.pairs,
        shape.tokens,
    )
