"""The native CUDA backend: the compiled kernels of csrc/cuda behind prefkern.backends.tiled.

Shapes: N tokens, V vocabulary, M scored rows; tiles [m, w]. Matrix products are torch's; the
kernels read tiles of their results once. Importing this module loads no CUDA library: that happens
for the first problem that is on a CUDA device.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import env
from .contract import Problem
from .tiled import ops as sweep_ops
from .tiled.epilogue import FACTORS, PARAMS, Call, LogitOptions, Tile
from .tiled.heads import make_call, parse
from .tiled.logits import top_set

LIBRARY = Path(__file__).parents[1].joinpath("_ops_cuda.so")
RAN_ON = Path(__file__).parents[1].joinpath("cuda_ran_on.json")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Codes of csrc/dispatch.h.
CODES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
# op -> the kernels it may launch, by the names of csrc/cuda/*.cu
_ONE = ("fold_one_small", "fold_one", "gradient_one_small", "gradient_one")
_TWO = (
    "fold_two_small", "fold_two", "fold_second", "seen_logits", "gradient_two_small",
    "gradient_two",
)  # fmt: skip
_FROZEN = ("frozen_factors", "raise_rows")
KERNELS: dict[str, tuple[str, ...]] = {
    "linear_logps": (*_ONE, *_FROZEN),
    "linear_divergence": (*_TWO, *_FROZEN),
    "logits_logps": (
        *_ONE, *_TWO, "finish_logits", "finish_logits_second", "logits_coefficients",
    ),
    "list_rank": (
        "list_pairs", "list_pairs_f64", "list_stages", "list_stages_f64", "list_softmax",
        "list_softmax_f64",
    ),
    "segment_sum": (
        "segment_sums", "segment_sums_f64", "segment_merge", "segment_slopes", "segment_slopes_f64",
    ),
}  # fmt: skip
# Ops outside the head sum in float64 and take it.
SUM_DTYPES = {
    "list_rank": (torch.float32, torch.float64),
    "segment_sum": (torch.float32, torch.float64),
}


@functools.cache
def load_error() -> str | None:
    """Loads the library once; the reason in words when that is not possible."""
    if reason := missing():
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no GPU (no driver, or one that is too old for this torch)"
    if reason := older(torch.version.cuda, _record().get("cuda_toolkit")):
        return reason
    if reason := unserved(torch.cuda.get_device_capability(), _record().get("cuda_archs", [])):
        return reason
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the compiled library {LIBRARY} does not load: {error}"
    return None


def missing() -> str | None:
    """Why there is no library to load, without loading it."""
    if LIBRARY.exists():
        return None
    reason = _record().get("cuda_reason") or "build it with: pip install --no-build-isolation ."
    return f"the compiled library {LIBRARY.name} is not there ({reason})"


def _record() -> dict[str, Any]:
    """What setup.py wrote about the build."""
    record = Path(__file__).parents[1].joinpath("_build.json")
    return json.loads(record.read_text()) if record.exists() else {}


def older(torch_cuda: str, toolkit: str | None) -> str | None:
    """Why a library of CUDA `toolkit` may find no driver that is new enough: a driver of one major
    version serves every toolkit of it, and torch's own version is the one it is known to serve."""
    if toolkit is None or int(torch_cuda.split(".")[0]) >= int(toolkit.split(".")[0]):
        return None
    return (
        f"it was built with CUDA {toolkit} and torch uses CUDA {torch_cuda}, whose driver may be "
        "too old for it; build it with a toolkit of torch's version, or install torch for CUDA "
        f"{toolkit.split('.')[0]}"
    )


def unserved(capability: tuple[int, int], archs: list[str]) -> str | None:
    """Why code for `archs` (sm_80, sm_90a ...) does not run on a GPU. Machine code runs on later
    GPUs of its generation, with an `a` on its own alone; PTX of the newest on what is newer."""
    made = {x: divmod(int(x.strip("sm_af")), 10) for x in archs}
    same = (x for x, (major, _) in made.items() if major == capability[0])
    if any(made[x] == capability or (x[-1] != "a" and made[x] < capability) for x in same):
        return None
    if not made or capability > max(made.values()):
        return None
    return f"it was built for {', '.join(archs)}, and this GPU is sm_{capability[0]}{capability[1]}"


def unsupported(problem: Problem) -> list[str]:
    """Reasons why these kernels cannot serve `problem`; empty when they can."""
    for name in ("PREFKERN_NO_CUDA", "PREFKERN_NO_EXT"):
        if env.flag(name):
            return [f"{name} is set"]
    if reason := missing():
        return [reason]
    reasons = unfit(problem)
    if problem.device != "cuda":
        reasons.append(f"it runs on cuda tensors, got {problem.device}")
    elif error := load_error():
        reasons.append(error)
    return reasons


def unfit(problem: Problem) -> list[str]:
    """Reasons that lie in the problem itself, whatever machine this is."""
    reasons = []
    if problem.op not in KERNELS:
        reasons.append(f"it has no {problem.op} (it has {', '.join(KERNELS)})")
    elif problem.dtype not in (dtypes := SUM_DTYPES.get(problem.op, DTYPES)):
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        reasons.append(f"its {problem.op} computes in {names}, got {problem.dtype}")
    return reasons


def held_back(problem: Problem) -> list[str]:
    """Kernels that `problem` may launch and no recorded run on a GPU has seen."""
    never = [name for name in KERNELS.get(problem.op, ()) if ran_on()[name] is None]
    if not never:
        return []
    return [f"no recorded run on a GPU of its kernels {', '.join(never)} ({RAN_ON.name})"]


@functools.cache
def ran_on() -> dict[str, dict[str, str] | None]:
    """Kernel -> the GPU and commit that a recorded run had, None where there is none."""
    return json.loads(RAN_ON.read_text())


def _code(call: Call) -> int:
    return CODES[call.working]


def _stats(call: Call) -> str:
    return ",".join(str(s) for s in call.stats)


def _numbers(call: Call) -> list[float]:
    """PARAMS from the options themselves: reading call.params would wait for the device."""
    ref = call.ref or call.policy
    numbers = {
        "factor": call.policy.factor(), "top": call.policy.top(), "slope": call.policy.slope(),
        "ref_factor": ref.factor(), "ref_top": ref.top(),
        **{name: call.param(name) for name in ("alpha", "renyi", "mix", "jsd")},
    }  # fmt: skip
    return [numbers[name] for name in PARAMS]


def _biases(call: Call) -> tuple[Tensor | None, Tensor | None]:
    return call.policy.bias, None if call.ref is None else call.ref.bias


class Kernels:
    """prefkern.backends.tiled.epilogue.Epilogue in CUDA C++; csrc/cuda/sweep_ops.h has the ops."""

    # The driver's widest chunk: a block reads several anyway, and writes one.
    CHUNK = 4096

    def chunk_columns(self, call: Call) -> int:
        return self.CHUNK

    def fold(self, call: Call, tile: Tile, fields: Tensor, at_target: Tensor) -> None:
        rounds = call.rounds and tile.z.dtype != call.working
        keep = tile.keep if rounds else (None, None)
        torch.ops.prefkern_cuda.fold(
            tile.z, tile.zr, tile.za, tile.adv, *_biases(call), call.targets[tile.rows], fields,
            at_target, *keep, tile.v0, self.chunk_columns(call), call.small, rounds, _code(call),
            _stats(call), _numbers(call),
        )  # fmt: skip

    def fold_second(self, call: Call, tile: Tile, norms: Tensor, fields: Tensor) -> None:
        torch.ops.prefkern_cuda.fold_second(
            tile.z, tile.zr, *_biases(call), call.targets[tile.rows], norms, fields, tile.v0,
            self.chunk_columns(call), _code(call), _stats(call), _numbers(call),
        )  # fmt: skip

    def seen(self, call: Call, zr: Tensor, v0: int, out: Tensor) -> None:
        torch.ops.prefkern_cuda.seen(zr, _biases(call)[1], out, v0, _code(call), _numbers(call))

    def factor(self, call: Call, tile: Tile, maxima: Tensor, name: str, out: Tensor) -> None:
        outs = [out if name == factor else None for factor in FACTORS]
        torch.ops.prefkern_cuda.factors(
            tile.z, tile.zr, *_biases(call), call.targets[tile.rows], maxima, *outs, tile.v0,
            _numbers(call),
        )  # fmt: skip

    def raise_rows(self, names: tuple[str, ...], totals: Tensor, shift: Tensor) -> None:
        torch.ops.prefkern_cuda.raise_rows(totals, shift, *(name in names for name in FACTORS[1:]))

    def gradient(self, call: Call, tile: Tile, coefficients: Tensor, dx: Tensor) -> None:
        torch.ops.prefkern_cuda.gradient(
            tile.z, tile.zr, tile.za, tile.adv, *_biases(call), call.targets[tile.rows],
            coefficients, dx, tile.v0, call.small, _numbers(call),
        )  # fmt: skip


KERNEL_SET = Kernels()
linear_logps_fwd = functools.partial(sweep_ops.linear_logps_fwd, KERNEL_SET)
linear_logps_bwd = functools.partial(sweep_ops.linear_logps_bwd, KERNEL_SET)
linear_divergence_fwd = functools.partial(sweep_ops.linear_divergence_fwd, KERNEL_SET)
linear_divergence_bwd = functools.partial(sweep_ops.linear_divergence_bwd, KERNEL_SET)


def logits_logps_fwd(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    ref_logits: Tensor | None,  # [N, V]
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
) -> tuple[Tensor, Tensor]:
    """(out [n, N], saved [10, N])."""
    top = None
    if ref_logits is not None and any(s.startswith("bkl") for s in stats):
        options = [LogitOptions(1.0, None, temperature)] * 2
        call = make_call(
            parse(stats), options, "", logits.shape[1], logits.dtype, targets, given=True
        )
        tile = Tile(0, 0, logits, ref_logits)
        top = torch.stack(top_set(KERNEL_SET, call, tile)).float()
    return torch.ops.prefkern_cuda.logits_fwd(
        logits, targets, ref_logits, top, temperature, ignore_index, ",".join(stats)
    )


def logits_logps_bwd(
    d_out: Tensor,  # [n, N]
    logits: Tensor,
    targets: Tensor,
    ref_logits: Tensor | None,
    out: Tensor,
    saved: Tensor,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
) -> Tensor:
    """d_logits [N, V] in the logits' dtype."""
    return torch.ops.prefkern_cuda.logits_bwd(
        d_out, logits, targets, ref_logits, out, saved, temperature, ignore_index, ",".join(stats)
    )


def list_rank_fwd(
    scores: Tensor,  # [S]
    labels: Tensor,  # [S], NaN where masked
    cu_groups: Tensor,  # [G+1] int32
    topk: Tensor | None,  # [G] int64
    family: str,
    options: str,
) -> tuple[Tensor, Tensor]:
    """(loss [G], u [S])."""
    return torch.ops.prefkern_cuda.list_rank_fwd(scores, labels, cu_groups, topk, family, options)


def segment_sum_fwd(
    values: Tensor,  # [m, N]
    weights: Tensor | None,  # [N] or [m, N]
    cu_seqlens: Tensor,  # [S+1] int32
) -> Tensor:
    """[m, S] float64."""
    return torch.ops.prefkern_cuda.segment_sum_fwd(values, weights, cu_seqlens)


def segment_sum_bwd(
    d_out: Tensor,  # [m, S]
    values: Tensor,
    weights: Tensor | None,
    cu_seqlens: Tensor,
    need_values: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """(d_values [m, N], d_weights like weights); [0] where not needed."""
    return torch.ops.prefkern_cuda.segment_sum_bwd(
        d_out, values, weights, cu_seqlens, need_values, need_weights
    )
