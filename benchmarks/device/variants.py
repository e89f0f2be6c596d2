"""Who is timed on a GPU: prefkern's schemes, plain PyTorch, and the peers that are installed.

A variant turns a case into a function `Inputs -> {statistic: [N]}` whose result can be
differentiated; ImportError says why it is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import prefkern
from prefkern.backends import choice
from prefkern.backends.contract import Problem

from .cases import STATS, Case, Inputs

Forward = Callable[[Inputs], dict[str, Tensor]]
MIB = 1 << 20


@dataclass(frozen=True)
class Variant:
    name: str
    build: Callable[[Case, str], Forward]
    steps: tuple[str, ...] = ("logp", "tdpo")
    compiled: bool = False
    logits: int = 0  # full [N, V] arrays it holds, bytes per logit: skipped where they do not fit


def missing(reason: str) -> ImportError:
    return ImportError(reason)


# ---- ours ----------------------------------------------------------------------------------------
def ours(backend: str, budget: int | None):
    def build(case: Case, device: str) -> Forward:
        stats = STATS[case.step]
        op = "linear_logps" if case.step == "logp" else "linear_divergence"
        problem = Problem(
            op=op, device=device, dtype=case.dtype, weight_dtype=case.dtype, stats=stats,
            N=case.N, V=case.head.V, D=case.head.D,
        )  # fmt: skip
        if reasons := choice.unsupported(backend, problem):
            raise missing("; ".join(reasons))
        options = {
            "stats": stats, "backend": backend, "memory_budget": budget, "num_scored": case.N,
        }  # fmt: skip

        def run(x: Inputs) -> dict[str, Tensor]:
            if case.step == "logp":
                found = prefkern.linear_logps(x.hidden, x.weight, x.targets, **options)
            else:
                found = prefkern.linear_divergence(
                    x.hidden, x.weight, x.targets, x.ref_hidden, x.ref_weight, **options
                )
            return {s: getattr(found, s) for s in stats}

        return run

    return build


# ---- plain PyTorch -------------------------------------------------------------------------------
def full_logits(h: Tensor, w: Tensor, rh: Tensor, rw: Tensor, y: Tensor, two: bool) -> list[Tensor]:
    index = y[:, None]
    lp = (h @ w.T).float().log_softmax(-1)
    if not two:
        return [lp.gather(1, index)[:, 0]]
    with torch.no_grad():
        lr = (rh @ rw.T).float().log_softmax(-1)
    fkl = (lr.exp() * (lr - lp)).sum(-1)
    return [lp.gather(1, index)[:, 0], lr.gather(1, index)[:, 0], fkl]


def plain(compiled: bool):
    def build(case: Case, device: str) -> Forward:
        function = torch.compile(full_logits, dynamic=False) if compiled else full_logits

        def run(x: Inputs) -> dict[str, Tensor]:
            arguments = (x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.targets)
            found = function(*arguments, case.step == "tdpo")
            return dict(zip(STATS[case.step], found, strict=True))

        return run

    return build


# ---- peers ---------------------------------------------------------------------------------------
def trl(case: Case, device: str) -> Forward:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ("log_probs",))[0]

    def run(x: Inputs) -> dict[str, Tensor]:
        found = {"logp": logps(x.hidden, x.weight, x.targets)}
        if case.step == "tdpo":
            with torch.no_grad():
                found["ref_logp"] = logps(x.ref_hidden, x.ref_weight, x.targets)
            found["fkl"] = ChunkedDivergenceFunction.apply(
                x.hidden, x.weight, None, x.ref_hidden, x.ref_weight, None, 0.0
            )[0]
        return found

    return run


def liger_cross_entropy(case: Case, device: str) -> Forward:
    """Fused linear cross-entropy, one loss per token (its gradient per token recomputes)."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run(x: Inputs) -> dict[str, Tensor]:
        return {
            "logp": -liger_fused_linear_cross_entropy(
                x.hidden, x.weight, x.targets, reduction="none"
            )
        }

    return run


def liger_log_probs(case: Case, device: str) -> Forward:
    from liger_kernel.chunked_loss import fused_linear_ppo as ppo

    width = ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    function = ppo._ChunkedSelectiveLogProbFunction
    return lambda x: {"logp": function.apply(x.hidden, x.weight, x.targets, None, 1.0, width)}


def cce(preset: str):
    def build(case: Case, device: str) -> Forward:
        if device != "cuda":
            raise missing("its kernels need a GPU")
        from cut_cross_entropy import linear_cross_entropy

        def run(x: Inputs) -> dict[str, Tensor]:
            return {
                "logp": -linear_cross_entropy(
                    x.hidden, x.weight, x.targets, reduction="none", impl=preset
                )
            }

        return run

    return build


def torch_chunked(case: Case, device: str) -> Forward:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        raise missing(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x: {
        "logp": -function(x.hidden, x.weight, x.targets, reduction="none", options=options)
    }


VARIANTS = (
    Variant("prefkern triton", ours("triton", None)),
    Variant("prefkern triton, budget 0", ours("triton", 0)),
    Variant("prefkern triton, budget 8 GiB", ours("triton", 8 << 30)),
    Variant("prefkern cuda", ours("cuda", None)),
    Variant("prefkern cuda, budget 0", ours("cuda", 0)),
    Variant("prefkern cuda, budget 8 GiB", ours("cuda", 8 << 30)),
    Variant("TRL", trl),
    Variant("Liger fused cross-entropy", liger_cross_entropy, ("logp",)),
    Variant("Liger log-probs", liger_log_probs, ("logp",)),
    Variant("CCE", cce("cce"), ("logp",)),
    Variant("CCE exact", cce("cce_exact"), ("logp",)),
    Variant("torch linear_cross_entropy", torch_chunked, ("logp",)),
    Variant("eager", plain(False), logits=18),
    Variant("torch.compile", plain(True), compiled=True, logits=10),
    Variant("prefkern eager", ours("eager", 0), logits=30),
)
