"""Regimes, arguments and inputs of the head ops: what the checks (tests/op_checks.py) run on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import oracles
import pytest
import torch
from closeness import stat_dtype
from torch import Tensor

from prefkern.backends import choice
from prefkern.backends.contract import Problem

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (FP32, BF16, FP16, FP64)
IGNORE = -100

PLAIN_PROBLEM = Problem(
    op="linear_logps", device="cpu", dtype=torch.float32, stats=("logp",), N=8, V=8, D=8
)


def backends_on(op: str = "linear_logps") -> tuple[str, ...]:
    """Backends that can serve a plain float32 call of the op on this machine."""
    problem = replace(PLAIN_PROBLEM, op=op)
    return tuple(name for name in choice.backend_names() if not choice.unsupported(name, problem))


def device_of(backend: str) -> str:
    """Where a backend is tested: cpu tensors if it takes them, else the GPU."""
    return "cuda" if choice.unsupported(backend, PLAIN_PROBLEM) else "cpu"


def gpu_backends() -> tuple[str, ...]:
    """Backends of their own kernels that can serve this machine's GPU; none without a GPU."""
    if not torch.cuda.is_available():
        return ()
    problem = replace(PLAIN_PROBLEM, device="cuda")
    names = (n for n in choice.backend_names() if n != "eager")
    return tuple(n for n in names if not choice.unsupported(n, problem))


ONE_MODEL = ("logp", "lse", "zy", "ent", "col", "top1", "zmean")
TWO_MODEL = (
    "logp",
    "ref_logp",
    "ref_lse",
    "fkl",
    "rkl",
    "jsd:0.3",
    "alpha:0.4",
    "renyi:0.6",
    "tv",
    "bkl:3",
    "mix:0.25",
    "ev",
)


def differentiable(stats) -> tuple[str, ...]:
    return tuple(s for s in stats if field_of(s) not in oracles.NO_GRADIENT)


def field_of(stat: str) -> str:
    return stat.partition(":")[0]


@dataclass(frozen=True)
class Regime:
    """Sizes and layout of one call; `why` is the part of an implementation that it visits."""

    why: str
    N: int = 24
    V: int = 97
    D: int = 16
    ignored: str = "some"  # none, some, all, run (a whole sequence)
    strided: bool = False


REGIMES = (
    Regime("aligned", N=32, V=128, D=32, ignored="none"),
    Regime("ragged_N", N=37, V=128, D=32),
    Regime("ragged_V", N=32, V=131, D=32),
    Regime("odd_D", N=32, V=128, D=29),
    Regime("one_row", N=1, V=128, D=32, ignored="none"),
    Regime("V_below_one_block", N=16, V=5, D=16),
    Regime("V_is_1", N=9, V=1, D=8),
    Regime("D_is_1", N=9, V=40, D=1),
    Regime("all_targets_ignored", N=12, V=64, D=16, ignored="all"),
    Regime("one_sequence_empty", N=40, V=64, D=16, ignored="run"),
    Regime("strided_input", N=21, V=67, D=18, strided=True),
    Regime("several_V_tiles_last_ragged", N=5, V=32003, D=8),
    Regime("several_N_tiles_last_ragged", N=1163, V=33, D=12),
)
SMALL = Regime("small", N=23, V=61, D=14)
# enough independent roundings for the floors of 16-bit gradients to fade: the factor of 2 decides
MANY_ROWS = Regime("many_rows", N=400, V=61, D=14)
# 70 of 101 rows are scored: budgets can keep none, some or all of them
PARTIAL = Regime("partial", N=101, V=61, D=14)
OPS = ("linear_logps", "linear_divergence")
ops = pytest.mark.parametrize("op", OPS)
regimes = pytest.mark.parametrize("regime", REGIMES, ids=lambda r: r.why)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@dataclass(frozen=True)
class Options:
    """Arguments of the logits; `bias` is one of None, dense, padded (-inf entries)."""

    why: str
    bias: str | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def numbers(self) -> dict:
        return {"scale": self.scale, "softcap": self.softcap, "temperature": self.temperature}


PLAIN = Options("plain")
OPTIONS = (
    Options("bias", bias="dense"),
    Options("bias_with_padded_vocabulary", bias="padded"),
    Options("scale", scale=0.37),
    Options("negative_scale", scale=-1.5),
    Options("softcap", softcap=3.0),
    Options("saturated_softcap", softcap=0.8),
    Options("temperature", temperature=0.7),
    Options("all_of_them", bias="dense", scale=1.3, softcap=5.0, temperature=1.9),
)
options = pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.why)


@dataclass
class Inputs:
    """Tensors of one call; `ref_*` and `aux_*` only for linear_divergence."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [N]
    bias: Tensor | None = None  # [V]
    ref_hidden: Tensor | None = None  # [N, Dr]
    ref_weight: Tensor | None = None  # [V, Dr]
    ref_bias: Tensor | None = None
    values: Tensor | None = None  # [V]

    def replace(self, **changes) -> Inputs:
        return replace(self, **changes)

    def to(self, device: str) -> Inputs:
        return Inputs(**{k: x if x is None else x.to(device) for k, x in vars(self).items()})


def make_targets(generator: torch.Generator, n: int, v: int, ignored: str) -> Tensor:
    targets = torch.randint(0, v, (n,), generator=generator)
    if ignored == "all":
        targets[:] = IGNORE
    elif ignored == "run":
        targets[n // 4 : n // 2] = IGNORE
    elif ignored == "some":
        targets[torch.rand(n, generator=generator) < 0.3] = IGNORE
        targets[0] = IGNORE  # the first kept row is not row 0
        targets[n - 1] = v - 1  # the last column is somebody's target
    return targets


def spread(x: Tensor) -> Tensor:
    """The same numbers with strides (2 * columns + 2, 2)."""
    wide = torch.zeros(x.shape[0], 2 * x.shape[1] + 2, dtype=x.dtype)
    view = wide[:, 1 : 2 * x.shape[1] + 1 : 2]
    view.copy_(x)
    return view


def make_inputs(
    regime: Regime,
    dtype: torch.dtype,
    *,
    option: Options = PLAIN,
    weight_dtype: torch.dtype | None = None,
    shared: bool = False,
    lean: float = 0.5,
    seed: int = 0,
) -> Inputs:
    """Hidden states whose logits spread by about 2 nats, half of them leaning to their target by
    about 4 `lean` nats."""
    g = torch.Generator().manual_seed(seed + 7919 * regime.N + 104729 * regime.V + regime.D)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=FP64)

    n, v, d = regime.N, regime.V, regime.D
    targets = make_targets(g, n, v, regime.ignored)
    weight = normal(v, d) * (2 / d**0.5)
    hidden = normal(n, d)
    sure = (torch.arange(n) % 2 == 0) & (targets >= 0)
    hidden[sure] += lean * weight[targets[sure]]
    dr = d if shared else d + 3
    ref_hidden = hidden + 0.3 * normal(n, d) if shared else normal(n, dr)
    ref_weight = weight if shared else normal(v, dr) * (2 / dr**0.5)
    bias = ref_bias = None
    if option.bias:
        bias, ref_bias = normal(v), normal(v)
        if option.bias == "padded":
            # the padded tail of a vocabulary, plus one column in the middle; never a target
            dead = torch.zeros(v, dtype=torch.bool)
            dead[v // 2] = True
            dead[v - 3 :] = True
            bias[dead] = ref_bias[dead] = float("-inf")
            free = (~dead).nonzero()[:, 0]
            hit = (targets >= 0) & dead[targets.clamp(min=0)]
            targets[hit] = free[0]
    cast = {
        "hidden": hidden.to(dtype),
        "weight": weight.to(weight_dtype or dtype),
        "ref_hidden": ref_hidden.to(dtype),
        "ref_weight": ref_weight.to(weight_dtype or dtype),
    }
    if regime.strided:
        cast = {k: spread(x) for k, x in cast.items()}
    if shared:
        cast["ref_weight"] = cast["weight"]
    return Inputs(
        targets=targets,
        bias=None if bias is None else bias.to(dtype),
        ref_bias=None if ref_bias is None else ref_bias.to(dtype),
        values=normal(v).to(stat_dtype(dtype)),
        **cast,
    )


def upstream_for(stats, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random d_out of every differentiable statistic, in the statistics' dtype."""
    g = torch.Generator().manual_seed(11 * n + len(stats))
    return {
        s: torch.randn(n, generator=g, dtype=FP64).to(stat_dtype(dtype))
        for s in differentiable(stats)
    }


def one_model(regime: Regime, dtype: torch.dtype, **arguments) -> Inputs:
    """Inputs without a reference, so that the checks call linear_logps."""
    return make_inputs(regime, dtype, **arguments).replace(
        ref_hidden=None, ref_weight=None, ref_bias=None, values=None
    )
