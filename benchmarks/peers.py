"""The peers: torch's chunked cross entropy, TRL, Liger, Cut Cross Entropy, quack, TRL's trainer.

Each is called as its own trainers call it. `VARIANTS` is everybody, prefkern and plain PyTorch too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import trl_step
from .cases import BETA, IGNORE, Case, Inputs
from .variants import (
    DIVERGENCES,
    LOGP_STEPS,
    OURS,
    PLAIN,
    Step,
    Tokens,
    Variant,
    _kept,
    from_logps,
    from_tokens,
)

_BETA_OF = {"fkl": 0.0, "rkl": 1.0, "jsd": 0.5}  # generalized JSD of TRL and Liger


def _again(case: Case) -> float:
    return 1.0


def trl_kernels() -> tuple[Any, Any]:
    """TRL's two functions. Its package needs `datasets` for one name of trl.trainer.utils, a
    context that gathers sharded heads; where that is absent, one that gathers nothing stands in."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    if importlib.util.find_spec("datasets") is None:
        stand_in: Any = types.ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *heads: contextlib.nullcontext()
        sys.modules.setdefault("trl.trainer.utils", stand_in)
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return ChunkedLogProbFunction, ChunkedDivergenceFunction


def _torch_chunked(case: Case, x: Inputs) -> Step:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return -function(h, w, y, reduction="none", ignore_index=IGNORE, options=options)

    return from_logps(case, logps)


def _trl(width: int):
    def build(case: Case, x: Inputs) -> Step:
        chunked_logps, chunked_divergence = trl_kernels()

        def logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
            found = chunked_logps.apply(
                h, w, None, y.clamp(min=0), 1.0, width, None, 1.0, ("log_probs",)
            )[0]
            return torch.where(y != IGNORE, found, 0.0)

        if case.step in LOGP_STEPS:
            return from_logps(case, logps)

        def statistics(x: Inputs) -> Tokens:
            beta = _BETA_OF.get(case.step, 0.0)
            found = chunked_divergence.apply(
                x.hidden, x.weight, None, x.ref_hidden, x.ref_weight, None, beta
            )[0]
            found = torch.where(x.targets != IGNORE, found, 0.0)
            if case.step in DIVERGENCES:
                return {case.step: found}
            with torch.no_grad():
                reference = logps(x.ref_hidden, x.ref_weight, x.targets)
            policy = logps(x.hidden, x.weight, x.targets)
            return {"logp": policy, "ref_logp": reference, "fkl": found}

        return from_tokens(case, statistics)

    return build


def _liger_preference(compiled: bool):
    def build(case: Case, x: Inputs) -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        loss = LigerFusedLinearDPOLoss(ignore_index=IGNORE, beta=BETA, compiled=compiled)

        def step(x: Inputs) -> tuple[Tensor, Tokens]:
            def batch(t: Tensor) -> Tensor:
                return t.view(x.S, x.T, -1)

            found, _ = loss(
                x.weight, batch(x.hidden), x.targets.view(x.S, x.T),
                ref_input=batch(x.ref_hidden), ref_weight=x.ref_weight,
            )  # fmt: skip
            return found, {}

        return step

    return build


def _liger_divergence(compiled: bool):
    def build(case: Case, x: Inputs) -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_BETA_OF[case.step],
            ignore_index=IGNORE, compiled=compiled,
        )  # fmt: skip
        return lambda x: (loss(x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.targets), {})

    return build


def _liger_log_probs(case: Case, x: Inputs) -> Step:
    from liger_kernel.chunked_loss import fused_linear_ppo as ppo

    width = ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE

    def logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        found = ppo._ChunkedSelectiveLogProbFunction.apply(h, w, y.clamp(min=0), None, 1.0, width)
        return torch.where(y != IGNORE, found, 0.0)

    return from_logps(case, logps)


def _liger_cross_entropy(case: Case, x: Inputs) -> Step:
    """Fused linear cross entropy: a mean forms its gradient in the forward, one loss per token
    recomputes."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    call = functools.partial(liger_fused_linear_cross_entropy, ignore_index=IGNORE)
    if case.step == "ce":
        return lambda x: (call(x.hidden, x.weight, x.targets, reduction="mean"), {})
    return from_logps(case, lambda h, w, y: -call(h, w, y, reduction="none"))


def _liger_sm90(case: Case, x: Inputs) -> Step:
    """Its Hopper kernel itself: the dispatching function would fall back to torch operators."""
    module = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
    function = importlib.import_module(module).LigerFusedScaledCrossEntropySM90Function
    return from_logps(case, lambda h, w, y: -function.apply(h, w, y))


def _quack(case: Case, x: Inputs) -> Step:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x: (
        chunked_linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="mean"),
        {},
    )


def _cce(preset: str):
    def build(case: Case, x: Inputs) -> Step:
        from cut_cross_entropy import linear_cross_entropy

        return from_logps(
            case,
            lambda h, w, y: (
                -linear_cross_entropy(h, w, y, ignore_index=IGNORE, reduction="none", impl=preset)
            ),
        )

    return build


_CPU, _GPU = ("cpu",), ("cuda",)
_PEERS = [
    Variant("torch linear_cross_entropy", LOGP_STEPS, _torch_chunked, recompute=_again),
    Variant("CCE torch_compile", ("dpo",), _cce("torch_compile"), "cut-cross-entropy", _CPU,
            compiled=True, recompute=_kept),
    Variant("CCE", LOGP_STEPS, _cce("cce"), "cut-cross-entropy", _GPU),
    Variant("CCE exact", LOGP_STEPS, _cce("cce_exact"), "cut-cross-entropy", _GPU,
            recompute=_again),
    Variant("Liger DPO", ("dpo",), _liger_preference(False), "liger-kernel", recompute=_kept),
    Variant("Liger DPO compiled", ("dpo",), _liger_preference(True), "liger-kernel",
            compiled=True, recompute=_kept),
    Variant("Liger fused cross-entropy", LOGP_STEPS, _liger_cross_entropy, "liger-kernel", _GPU),
    Variant("Liger scaled cross-entropy SM90", LOGP_STEPS, _liger_sm90, "liger-kernel", _GPU,
            recompute=_again),
    Variant("Liger GRPO log-probs", LOGP_STEPS, _liger_log_probs, "liger-kernel",
            recompute=_again),
    Variant("Liger JSD", DIVERGENCES, _liger_divergence(False), "liger-kernel", recompute=_kept),
    Variant("Liger JSD compiled", DIVERGENCES, _liger_divergence(True), "liger-kernel",
            compiled=True, recompute=_kept),
    Variant("quack", ("ce",), _quack, "quack-kernels", _GPU, recompute=_kept),
    Variant("TRL 32768 columns", (*LOGP_STEPS, "tdpo", "tdpo2", *DIVERGENCES), _trl(32768), "trl"),
    Variant("TRL 4096 columns", ("dpo",), _trl(4096), "trl", _CPU, recompute=_again),
    *(Variant(name, ("trl",), build, package, _CPU)
      for name, (build, package) in trl_step.TRAINERS.items()),
]  # fmt: skip
VARIANTS: dict[str, Variant] = {v.name: v for v in (*OURS, *PLAIN, *_PEERS)}
