"""A call of every loss of LOSSES on small random input, for the tests of properties.

Nothing here names a loss; a new argument that a loss requires gets a line in `extra`.
"""

from __future__ import annotations

import inspect

import torch

from prefkern import losses
from prefkern.losses.record import Loss
from prefkern.stats import SeqStats, TokenStats

EVERY = sorted(losses.LOSSES)
# Diffusion losses read prediction errors, not SeqStats: test_diffusion_properties.py.
ALL = [n for n in EVERY if losses.LOSSES[n].family != "diffusion"]
PAIRWISE = [n for n in ALL if losses.LOSSES[n].family == "pairwise"]
POINTWISE = [n for n in ALL if losses.LOSSES[n].family == "pointwise"]
LISTWISE = [n for n in ALL if losses.LOSSES[n].family == "listwise"]
TOKENWISE = [n for n in ALL if losses.LOSSES[n].family == "tokenwise"]
# Losses whose rows influence each other, so that a batch is not the sum of its parts.
BATCH_COUPLED = {"aot", "beta_dpo", "dckd", "adpa"}
# No preference loss of its own: the objective adds the likelihood term.
LIKELIHOOD_ONLY = {"sft"}
FIELDS = ("fkl", "rkl", "col", "ent", "jsd", "ev")


def sequences(n: int, offset: float | torch.Tensor, seed: int, dtype=torch.float64) -> SeqStats:
    """Random statistics whose log-ratio is `offset`; logp and the KLs are leaves."""
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 40, (n,), generator=g).to(dtype)
    ref = -length * (0.5 + 2.0 * torch.rand(n, generator=g, dtype=dtype))
    fields = {name: torch.rand(n, generator=g, dtype=dtype).requires_grad_() for name in FIELDS}
    return SeqStats(logp=(ref + offset).requires_grad_(), ref_logp=ref, length=length, **fields)


def extra(record: Loss, n: int) -> dict:
    """The tensors a loss requires beside its sequences, apart from weight stages."""
    g = torch.Generator().manual_seed(7)
    make = {
        "desirable": lambda: torch.rand(n, generator=g) > 0.5,
        "kl_baseline": lambda: torch.tensor(0.3, dtype=torch.float64),
        "delta": lambda: torch.tensor(0.2, dtype=torch.float64),
        "rm_margin": lambda: torch.randn(n, generator=g, dtype=torch.float64) * 5,
        "keep": lambda: torch.arange(n) % 3 != 1,
        "margin_reward_chosen": lambda: torch.randn(n, 1, generator=g, dtype=torch.float64),
        "margin_reward_rejected": lambda: torch.randn(n, 1, generator=g, dtype=torch.float64),
        "pref_prob": lambda: torch.rand(n, generator=g, dtype=torch.float64),
        "baseline_mean_logps": lambda: -torch.rand(n, generator=g, dtype=torch.float64),
        "source_chosen_mean_logps": lambda: -torch.rand(n, 2, generator=g, dtype=torch.float64),
        "source_rejected_mean_logps": lambda: -torch.rand(n, 2, generator=g, dtype=torch.float64),
        "slow_chosen_logps": lambda: -torch.rand(n, generator=g, dtype=torch.float64) * 50,
        "slow_rejected_logps": lambda: -torch.rand(n, generator=g, dtype=torch.float64) * 50,
        "judge_logit_gap": lambda: torch.randn(n, generator=g, dtype=torch.float64),
        "score_chosen": lambda: 4.0 + 5.0 * torch.rand(n, generator=g, dtype=torch.float64),
        "score_rejected": lambda: 4.0 * torch.rand(n, generator=g, dtype=torch.float64),
        "log_target_prob": lambda: -torch.rand(n, generator=g, dtype=torch.float64) * 50,
        "topk": lambda: 2,
        "source": lambda: torch.tensor([1, 0]),
        "source_weights": lambda: torch.tensor([0.3, 0.7], dtype=torch.float64),
        # neighbours, within the two halves of the list
        "pairs": lambda: torch.tensor(
            [(i, i + 1) for i in range(n - 1) if i + 1 != n // 2], dtype=torch.int64
        ).reshape(-1, 2),
        # of a tokenwise loss, two tokens per sequence
        "scored": lambda: torch.arange(2 * n) % 7 != 3,
        "cu_groups": lambda: torch.tensor([0, n // 2, n], dtype=torch.int32),
        "advantages": lambda: torch.randn(n, generator=g, dtype=torch.float64),
        "preference_levels": lambda: 1 + torch.arange(n) % 3,
        "value": lambda: torch.randn(2 * n, generator=g, dtype=torch.float64),
        "step_reward": lambda: torch.randn(2 * n, generator=g, dtype=torch.float64),
        "reward": lambda: torch.randn(n, generator=g, dtype=torch.float64),
    }
    found = {name: make[name]() for name in record.extra if name in make}
    if "pairs" in found:
        found["pref_prob"] = torch.rand(len(found["pairs"]), generator=g, dtype=torch.float64)
    if "cu_segments" in inspect.signature(record.fn).parameters:
        found["step_index"] = 1 + torch.arange(2 * n) % 2
        found["cu_groups"] = torch.arange(0, n + 1, 2, dtype=torch.int32)
    if "old_logp" in inspect.signature(record.fn).parameters:
        # beyond the clip for some, else the ratio is 1 everywhere
        found["old_logp"] = tokens(n, 0.0, 0).logp.detach() - 0.1 - torch.rand(2 * n, generator=g)
    return found  # the rest is filled from the statistics


def tokens(n: int, offset: float | torch.Tensor, seed: int, dtype=torch.float64) -> TokenStats:
    """Two tokens per sequence whose log-ratio is `offset` each; logp and the KLs are leaves."""
    g = torch.Generator().manual_seed(seed)
    ref = -(0.5 + 2.0 * torch.rand(2 * n, generator=g, dtype=dtype))
    kls = {k: torch.rand(2 * n, generator=g, dtype=dtype).requires_grad_() for k in ("fkl", "rkl")}
    shift = offset.repeat_interleave(2) if isinstance(offset, torch.Tensor) else offset
    return TokenStats(logp=(ref + shift).requires_grad_(), ref_logp=ref, **kls)


class Example:
    """A call of a loss on `n` items with the given log-ratios."""

    def __init__(
        self, name: str, n: int = 5, offsets: tuple = (0.0, 0.0), dtype=torch.float64
    ) -> None:
        self.record = losses.LOSSES[name]
        if self.record.family == "pairwise":
            self.rows = [
                sequences(n, offsets[min(i, 1)], i, dtype)
                for i, _ in enumerate(positional(self.record))
            ]
        elif self.record.family == "tokenwise":
            self.rows = [tokens(n, offsets[0], 0, dtype)]
        else:
            self.rows = [sequences(n, offsets[0], 0, dtype)]
        self.extra = {k: self.typed(v, dtype) for k, v in extra(self.record, n).items()}

    @staticmethod
    def typed(value, dtype):
        return (
            value.to(dtype)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
        )

    def leaves(self) -> list[torch.Tensor]:
        return [t for row in self.rows for t in row if t is not None and t.requires_grad]

    def index(self, rows) -> Example:
        part = object.__new__(Example)
        part.record = self.record
        part.rows = [r.index(rows) for r in self.rows]
        n = len(self.rows[0].logp)
        part.extra = {
            k: v[rows] if v.dim() and v.shape[0] == n else v for k, v in self.extra.items()
        }
        return part

    def __call__(self) -> torch.Tensor:
        if self.record.family == "tokenwise":
            n = self.rows[0].ref_logp.numel()
            cu = torch.arange(0, n + 1, 2, dtype=torch.int32)
            return self.record(self.rows[0], cu, **self.extra)
        if self.record.family != "listwise":
            return self.record(*self.rows, **self.extra)
        (seq,) = self.rows
        n = seq.logp.numel()
        relevance = torch.arange(n, dtype=seq.logp.dtype).roll(1) / max(n, 1)
        scores = getattr(seq, self.record.score)
        filled = {k: getattr(seq, k) for k in self.record.extra if k not in self.extra}
        return self.record(
            scores,
            relevance,
            torch.tensor([0, n // 2, n], dtype=torch.int32),
            **filled,
            **self.extra,
        )


def positional(record: Loss) -> list[str]:
    parameters = inspect.signature(record.fn).parameters.items()
    return [k for k, p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def spread(n: int, width: float) -> torch.Tensor:
    return torch.linspace(-width, width, n, dtype=torch.float64)
