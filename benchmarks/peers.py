"""Every implementation that is measured: eager, compiled, torch's, TRL's, Liger's, CCE's and ours.

Peers are called as their own trainers call them. An import that fails makes an empty row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import prefkern
from prefkern.backends import choice
from prefkern.backends.contract import Problem

from .cases import ALPHA, BETA, IGNORE, Case, Inputs
from .variants import (
    Step,
    Variant,
    dpo_step,
    kept_share,
    mean_over_tokens,
    tdpo2_loss,
)

GIB = 1 << 30  # holds both models' logits of every case here
DIVERGENCES = ("fkl", "rkl", "jsd")
_BETA_OF = {"fkl": 0.0, "rkl": 1.0, "jsd": 0.5}  # generalized JSD of TRL and Liger


# ---- full logits ---------------------------------------------------------------------------------
def log_softmax_logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Statistics in fp32 whatever the product's dtype: bf16 log-softmax is 30 % wrong in dH."""
    lp = (h @ w.T).float().log_softmax(-1)
    picked = lp.gather(1, y.clamp(min=0)[:, None])[:, 0]
    return torch.where(y != IGNORE, picked, 0.0)


def cross_entropy_logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return -F.cross_entropy((h @ w.T).float(), y, reduction="none", ignore_index=IGNORE)


def divergence_from_logits(step: str, lp: Tensor, lr: Tensor) -> Tensor:  # [N]
    if step == "rkl":
        return (lp.exp() * (lp - lr)).sum(-1)
    if step == "jsd":
        mean = torch.logaddexp(lp, lr) - 0.6931471805599453
        return 0.5 * (lp.exp() * (lp - mean) + lr.exp() * (lr - mean)).sum(-1)
    return (lr.exp() * (lr - lp)).sum(-1)


def full_logits_statistics(step: str, h: Tensor, w: Tensor, rh: Tensor, rw: Tensor, y: Tensor):
    """tdpo2: (logp, ref_logp, fkl); otherwise (divergence,). Ignored rows are 0."""
    with torch.no_grad():
        lr = (rh @ rw.T).float().log_softmax(-1)
    lp = (h @ w.T).float().log_softmax(-1)
    keep, index = y != IGNORE, y.clamp(min=0)[:, None]
    divergence = torch.where(keep, divergence_from_logits(step, lp, lr), 0.0)
    if step != "tdpo2":
        return (divergence,)
    return (
        torch.where(keep, lp.gather(1, index)[:, 0], 0.0),
        torch.where(keep, lr.gather(1, index)[:, 0], 0.0),
        divergence,
    )


def _full_logits(statistics):
    def build(case: Case) -> Step:
        def step(x: Inputs) -> Tensor:
            found = statistics(case.step, x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.targets)
            return tdpo2_loss(*found, x) if case.step == "tdpo2" else mean_over_tokens(found[0], x)

        return step

    return build


def _eager(case: Case) -> Step:
    if case.step == "dpo":
        return dpo_step(log_softmax_logps)
    return _full_logits(full_logits_statistics)(case)


def _eager_cross_entropy(case: Case) -> Step:
    return dpo_step(cross_entropy_logps)


def _compiled(case: Case) -> Step:
    if case.step == "dpo":
        return dpo_step(torch.compile(log_softmax_logps, dynamic=False))
    return _full_logits(torch.compile(full_logits_statistics, dynamic=False))(case)


# ---- peers ---------------------------------------------------------------------------------------
def _torch_chunked(case: Case) -> Step:
    options = torch.nn.LinearCrossEntropyOptions()

    def logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return -F.linear_cross_entropy(
            h, w, y, reduction="none", ignore_index=IGNORE, options=options
        )

    return dpo_step(logps)


def _trl(width: int):
    def build(case: Case) -> Step:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        def logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            found = ChunkedLogProbFunction.apply(
                h, w, None, y.clamp(min=0), 1.0, width, None, 1.0, ("log_probs",)
            )[0]
            return torch.where(y != IGNORE, found, 0.0)

        if case.step == "dpo":
            return dpo_step(logps)
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def divergence(x: Inputs) -> Tensor:
            beta = _BETA_OF.get(case.step, 0.0)
            found, _ = ChunkedDivergenceFunction.apply(
                x.hidden, x.weight, None, x.ref_hidden, x.ref_weight, None, beta
            )
            return torch.where(x.targets != IGNORE, found, 0.0)

        if case.step != "tdpo2":
            return lambda x: mean_over_tokens(divergence(x), x)

        def step(x: Inputs) -> Tensor:
            with torch.no_grad():
                reference = logps(x.ref_hidden, x.ref_weight, x.targets)
            policy = logps(x.hidden, x.weight, x.targets)
            return tdpo2_loss(policy, reference, divergence(x), x)

        return step

    return build


def _liger_preference(compiled: bool):
    def build(case: Case) -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        loss = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA, compiled=compiled)

        def step(x: Inputs) -> Tensor:
            def batch(t: Tensor) -> Tensor:
                return t.view(x.S, x.T, -1)

            found, _ = loss(
                x.weight, batch(x.hidden), x.targets.view(x.S, x.T),
                ref_input=batch(x.ref_hidden), ref_weight=x.ref_weight,
            )  # fmt: skip
            return found

        return step

    return build


def _liger_divergence(compiled: bool):
    def build(case: Case) -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_BETA_OF[case.step],
            ignore_index=IGNORE, compiled=compiled,
        )  # fmt: skip
        return lambda x: loss(x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.targets)

    return build


def _liger_log_probs(case: Case) -> Step:
    from liger_kernel.chunked_loss import fused_linear_ppo as ppo

    width = ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE

    def logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        found = ppo._ChunkedSelectiveLogProbFunction.apply(h, w, y.clamp(min=0), None, 1.0, width)
        return torch.where(y != IGNORE, found, 0.0)

    return dpo_step(logps)


def _cce(case: Case) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    return dpo_step(
        lambda h, w, y: (
            -linear_cross_entropy(
                h, w, y, ignore_index=IGNORE, reduction="none", impl="torch_compile"
            )
        )
    )


# ---- ours ----------------------------------------------------------------------------------------
def _ours(backend: str, budget: int | None, metrics: bool = False):
    def build(case: Case) -> Step:
        op = "linear_logps" if case.step == "dpo" else "linear_divergence"
        problem = Problem(op=op, device="cpu", dtype=case.torch_dtype, stats=("logp",))
        reasons = choice.unsupported(backend, problem)
        if reasons:
            raise ImportError(f"backend {backend!r} is off: {'; '.join(reasons)}")
        options = {"backend": backend, "memory_budget": budget}
        if case.step in ("dpo", "tdpo2"):
            hyper = {"beta": BETA} if case.step == "dpo" else {"beta": BETA, "alpha": ALPHA}

            def step(x: Inputs) -> Tensor:
                loss, _ = prefkern.preference_loss(
                    x.hidden, x.weight, x.targets, x.cu_seqlens, loss=case.step, layout="halves",
                    ref_hidden=x.ref_hidden, ref_head=x.ref_weight, metrics=metrics,
                    **hyper, **options,
                )  # fmt: skip
                return loss

            return step
        name = "jsd:0.5" if case.step == "jsd" else case.step

        def divergence(x: Inputs) -> Tensor:
            found = prefkern.linear_divergence(
                x.hidden, x.weight, x.targets, x.ref_hidden, x.ref_weight, stats=(name,), **options
            )
            return mean_over_tokens(getattr(found, case.step), x)

        return divergence

    return build


def _recomputed(budget: int | None):
    def forwards(case: Case) -> float:
        if case.frozen and case.step != "jsd":
            return 0.0  # the forward forms the rows of dH
        return case.backward_heads * (1.0 - kept_share(case, budget))

    return forwards


def _kept_bytes(budget: int | None):
    def kept(case: Case) -> float:
        if case.frozen and case.step != "jsd":
            return 0.0
        rows = case.scored * kept_share(case, budget)
        return rows * case.backward_heads * case.shape.V * case.torch_dtype.itemsize

    return kept


_ALL = ("dpo", "tdpo2", *DIVERGENCES)


def _kept(case: Case) -> float:
    return 0.0


def _policy_again(case: Case) -> float:
    return 1.0


VARIANTS: dict[str, Variant] = {
    v.name: v
    for v in (
        Variant("prefkern cpu", _ALL, _ours("cpu", None), "prefkern",
                recompute=_recomputed(None), kept_bytes=_kept_bytes(None)),
        Variant("prefkern cpu, budget 0", _ALL, _ours("cpu", 0), "prefkern",
                recompute=_recomputed(0), kept_bytes=_kept_bytes(0)),
        Variant("prefkern cpu, budget 1 GiB", ("tdpo2", *DIVERGENCES), _ours("cpu", GIB),
                "prefkern", recompute=_recomputed(GIB), kept_bytes=_kept_bytes(GIB)),
        Variant("prefkern cpu, metrics", ("dpo", "tdpo2"), _ours("cpu", None, metrics=True),
                "prefkern", recompute=_recomputed(None), kept_bytes=_kept_bytes(None)),
        Variant("prefkern eager", _ALL, _ours("eager", None), "prefkern"),
        Variant("eager log_softmax", _ALL, _eager, recompute=_kept),
        Variant("eager cross_entropy", ("dpo",), _eager_cross_entropy, recompute=_kept),
        Variant("torch.compile", _ALL, _compiled, compiled=True, recompute=_kept),
        Variant("torch linear_cross_entropy", ("dpo",), _torch_chunked, recompute=_policy_again),
        Variant("CCE torch_compile", ("dpo",), _cce, "cut-cross-entropy", compiled=True,
                recompute=_kept),
        Variant("Liger DPO", ("dpo",), _liger_preference(False), "liger-kernel", recompute=_kept),
        Variant("Liger DPO compiled", ("dpo",), _liger_preference(True), "liger-kernel",
                compiled=True, recompute=_kept),
        Variant("Liger GRPO log-probs", ("dpo",), _liger_log_probs, "liger-kernel",
                recompute=_policy_again),
        Variant("Liger JSD", DIVERGENCES, _liger_divergence(False), "liger-kernel",
                recompute=_kept),
        Variant("Liger JSD compiled", DIVERGENCES, _liger_divergence(True), "liger-kernel",
                compiled=True, recompute=_kept),
        Variant("TRL 32768 columns", _ALL, _trl(32768), "trl"),
        Variant("TRL 4096 columns", ("dpo",), _trl(4096), "trl", recompute=_policy_again),
    )
}  # fmt: skip
