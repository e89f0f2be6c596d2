"""Who is measured: the record of a variant, prefkern's own, and plain PyTorch (peers.py: the rest).

A variant turns a case into a step: `Inputs -> (loss, statistics)`, whose loss fills the gradients
of `Inputs.leaves`. ImportError while it is built says why it is not there: an empty row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import prefkern

from . import inside, mixture
from .cases import ALPHA, BETA, IGNORE, NEEDS, Case, Inputs

Tokens = dict[str, Tensor]  # statistic -> [N], 0 where ignored
Step = Callable[[Inputs], tuple[Tensor, Tokens]]  # -> (loss [], statistics where it has them)
# (hidden [N, D], weight [V, D], targets [N]) -> log-probabilities [N], 0 where ignored
LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]

LOGP_STEPS = ("logp", "ce", "dpo")
DIVERGENCES = ("fkl", "rkl", "jsd")
HEAD_STEPS = (*LOGP_STEPS, "ent", "tdpo", "tdpo2", *DIVERGENCES)
GIB = 1 << 30


@dataclass(frozen=True)
class Variant:
    """One implementation. `recompute` is the number of forward products its backward repeats (below
    0 where it leaves products out), None where not stated."""

    name: str
    steps: tuple[str, ...]
    build: Callable[[Case, Inputs], Step]
    package: str = "torch"  # distribution whose version stands in the row
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False  # memory is counted from after the first call, which compiles
    recompute: Callable[[Case], float] | None = None
    kept_bytes: Callable[[Case], float] = field(default=lambda case: 0.0)  # under a memory budget
    logits: int = 0  # bytes per logit and model of full [N, V] arrays: must fit a GPU

    def serves(self, case: Case, device: str) -> bool:
        return case.step in self.steps and device in self.devices

    def products(self, case: Case) -> float | None:
        """Head-sized products of one step, by the variant's scheme."""
        return self.recompute and sum(case.products.values()) + self.recompute(case)


# ---- from statistics to a loss -------------------------------------------------------------------
def loss_of(step: str, tokens: Tokens, x: Inputs) -> Tensor:
    """The loss of a step as a user of the operators would write it."""
    if step in ("logp", "ent", "tdpo"):
        return sum((c * tokens[s].float()).sum() for s, c in x.upstream.items())
    count = (x.targets != IGNORE).sum()
    if step == "ce":
        return -tokens["logp"].sum() / count
    if step in DIVERGENCES:
        return tokens[step].sum() / count

    def halves(per_token: Tensor) -> Tensor:  # [N] -> (chosen [P], rejected [P])
        return per_token.view(2, -1, x.T).sum(-1)

    chosen, rejected = halves(tokens["logp"] - tokens["ref_logp"])
    margin = chosen - rejected
    if step == "tdpo2":  # the KL of the rejected answer is pushed, the other is a constant
        kl_chosen, kl_rejected = halves(tokens["fkl"])
        margin = margin - ALPHA * (kl_rejected - kl_chosen.detach())
    return -F.logsigmoid(BETA * margin).mean()


def from_tokens(case: Case, statistics: Callable[[Inputs], Tokens]) -> Step:
    def step(x: Inputs) -> tuple[Tensor, Tokens]:
        tokens = statistics(x)
        return loss_of(case.step, tokens, x), tokens

    return step


def from_logps(case: Case, logps: LogProbs) -> Step:
    """`logp`, `ce` or `dpo` from an operator that gives log-probabilities: one call per model."""

    def statistics(x: Inputs) -> Tokens:
        tokens = {}
        if case.step == "dpo":
            with torch.no_grad():
                tokens["ref_logp"] = logps(x.ref_hidden, x.ref_weight, x.targets)
        return tokens | {"logp": logps(x.hidden, x.weight, x.targets)}

    return from_tokens(case, statistics)


# ---- ours ----------------------------------------------------------------------------------------
def ours(backend: str, budget: int | None, *, metrics: bool = False, tail_mass: float = 0.0):
    """`preference_loss` where the step is a loss of it, else the op."""

    def build(case: Case, x: Inputs) -> Step:
        options: dict = {"memory_budget": budget, "backend": backend}
        if tail_mass:
            options["tail_mass"] = tail_mass
        if x.hidden.is_cuda:
            options["num_scored"] = case.scored  # None would wait for the device
        inside.require(backend, case, x)
        if case.step in ("dpo", "tdpo2"):
            hyper = {"beta": BETA} | ({"alpha": ALPHA} if case.step == "tdpo2" else {})

            def step(x: Inputs) -> tuple[Tensor, Tokens]:
                loss, _ = prefkern.preference_loss(
                    x.hidden, x.weight, x.targets, x.cu_seqlens, loss=case.step, layout="halves",
                    ref_hidden=x.ref_hidden, ref_head=x.ref_weight, metrics=metrics,
                    **hyper, **options,
                )  # fmt: skip
                return loss, {}

            return step
        options["stats"] = tuple("jsd:0.5" if s == "jsd" else s for s in NEEDS[case.step])

        def statistics(x: Inputs) -> Tokens:
            if case.models == 1:
                found = prefkern.linear_logps(x.hidden, x.weight, x.targets, **options)
            else:
                found = prefkern.linear_divergence(
                    x.hidden, x.weight, x.targets, x.ref_hidden, x.ref_weight, **options
                )
            return {name: getattr(found, name) for name in NEEDS[case.step]}

        return from_tokens(case, statistics)

    return build


def _recomputed(backend: str, budget: int | None, case: Case) -> float:
    if case.frozen and case.step != "jsd":
        return 0.0  # the forward forms the rows of dH
    return case.backward_heads * (1.0 - inside.kept_share(backend, budget, case))


def _kept_bytes(backend: str, budget: int | None, case: Case) -> float:
    if case.frozen and case.step != "jsd":
        return 0.0
    rows = case.scored * inside.kept_share(backend, budget, case)
    return rows * case.backward_heads * case.shape.V * inside.kept_itemsize(case)


def _only_needed(case: Case) -> float:
    """The whole backward (recompute, dH, dW) over the needed share of the units."""
    backward = case.products["d_hidden"] + case.products["d_weight"]
    return (case.share or 1.0) * (backward + case.backward_heads) - backward


def _ours(backend: str, label: str, budget: int | None, steps=HEAD_STEPS, **options) -> Variant:
    device = "cpu" if backend == "cpu" else "cuda"
    name = f"prefkern {backend}" + (f", {label}" if label else "")
    return Variant(
        name, steps, ours(backend, budget, **options), "prefkern",
        # Triton's interpreter serves CPU tensors: for trying a run without a GPU, not for times
        devices=("cpu", "cuda") if backend == "triton" and inside.INTERPRETED else (device,),
        recompute=_only_needed if "tail_mass" in options
        else functools.partial(_recomputed, backend, budget),
        kept_bytes=functools.partial(_kept_bytes, backend, budget),
    )  # fmt: skip


def _our_variants(backend: str) -> list[Variant]:
    large = ("1 GiB", GIB) if backend == "cpu" else ("8 GiB", 8 * GIB)
    rows = [
        _ours(backend, "", None),
        _ours(backend, "budget 0", 0),
        _ours(backend, f"budget {large[0]}", large[1], ("tdpo2", *DIVERGENCES) if backend == "cpu"
              else HEAD_STEPS),
        _ours(backend, "tail 2^-8", None, (*LOGP_STEPS, "tdpo", "tdpo2"), tail_mass=mixture.MASS),
    ]  # fmt: skip
    if backend == "cpu":
        rows.insert(3, _ours(backend, "metrics", None, ("dpo", "tdpo2"), metrics=True))
    return rows


# ---- full logits ---------------------------------------------------------------------------------
def _log_softmax_logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Statistics in fp32 whatever the product's dtype: bf16 log-softmax is 30 % wrong in dH."""
    lp = (h @ w.T).float().log_softmax(-1)
    picked = lp.gather(1, y.clamp(min=0)[:, None])[:, 0]
    return torch.where(y != IGNORE, picked, 0.0)


def _cross_entropy_logps(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return -F.cross_entropy((h @ w.T).float(), y, reduction="none", ignore_index=IGNORE)


def _full_statistics(
    names: tuple[str, ...], h: Tensor, w: Tensor, rh: Tensor, rw: Tensor, y: Tensor
) -> list[Tensor]:
    lp = lr = (h @ w.T).float().log_softmax(-1)
    if "ent" not in names:
        with torch.no_grad():
            lr = (rh @ rw.T).float().log_softmax(-1)
    keep, index = y != IGNORE, y.clamp(min=0)[:, None]
    found = []
    for name in names:
        if name in ("logp", "ref_logp"):
            value = (lp if name == "logp" else lr).gather(1, index)[:, 0]
        elif name == "ent":
            value = -(lp.exp() * lp).sum(-1)
        elif name == "rkl":
            value = (lp.exp() * (lp - lr)).sum(-1)
        elif name == "jsd":
            mean = torch.logaddexp(lp, lr) - 0.6931471805599453
            value = 0.5 * (lp.exp() * (lp - mean) + lr.exp() * (lr - mean)).sum(-1)
        else:
            value = (lr.exp() * (lr - lp)).sum(-1)
        found.append(torch.where(keep, value, 0.0))
    return found


def plain(logps: LogProbs, compiled: bool = False):
    def build(case: Case, x: Inputs) -> Step:
        wrap = functools.partial(torch.compile, dynamic=False) if compiled else lambda f: f
        if case.step in LOGP_STEPS:
            return from_logps(case, wrap(logps))
        function, names = wrap(_full_statistics), NEEDS[case.step]

        def statistics(x: Inputs) -> Tokens:
            found = function(names, x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.targets)
            return dict(zip(names, found, strict=True))

        return from_tokens(case, statistics)

    return build


def _kept(case: Case) -> float:
    return 0.0


OURS: list[Variant] = [v for b in ("cpu", "triton", "cuda") for v in _our_variants(b)]
PLAIN: list[Variant] = [
    Variant("prefkern eager", HEAD_STEPS, ours("eager", None), "prefkern", logits=30),
    Variant("eager log_softmax", HEAD_STEPS, plain(_log_softmax_logps), recompute=_kept, logits=18),
    Variant("eager cross_entropy", ("dpo",), plain(_cross_entropy_logps), recompute=_kept,
            logits=18),
    Variant("torch.compile", HEAD_STEPS, plain(_log_softmax_logps, compiled=True), compiled=True,
            recompute=_kept, logits=10),
]  # fmt: skip
