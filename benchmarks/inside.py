"""What the benchmarks know of prefkern's inside, all of it in this file: which kernels were
launched, the memory budget, and the kernels of a tile one by one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from prefkern.backends import choice, list_options, memory, tables
from prefkern.backends.contract import HeadCall, Model, Problem
from prefkern.backends.plan import NO_PLAN, read_plan, write_plan
from prefkern.backends.tiled.epilogue import FrozenSums, LogitOptions, ProductTile, Sweep
from prefkern.backends.tiled.operands import tile_itemsize
from prefkern.backends.tiled.tiling import Kept, make_tiling
from prefkern.ops.budget import rows_kept
from prefkern.ops.list_rank import list_rank
from prefkern.stats import ONE_MODEL_STATS, TWO_MODEL_STATS, parse_stats

from .cases import NEEDS
from .timing import Call, Cpu

if TYPE_CHECKING:
    from .cases import Case, Inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton then serves CPU tensors


def reasons(backend: str, op: str, device: str, dtype: torch.dtype, **more: Any) -> list[str]:
    """Why a backend cannot serve a problem; empty when it can."""
    return choice.unsupported(backend, Problem(op, device, dtype, **more))


def require(backend: str, case: Case, x: Inputs) -> None:
    """ImportError with the reasons where a backend cannot serve a case."""
    op = "linear_logps" if case.models == 1 else "linear_divergence"
    found = reasons(backend, op, x.hidden.device.type, case.torch_dtype, stats=("logp",))
    if found:
        raise ImportError(f"backend {backend!r} is off: {'; '.join(found)}")


def _plan(stats: tuple[str, ...], quiet: frozenset[str], call: HeadCall, **more: Any) -> HeadCall:
    """The call with the plan of 16-bit operands for these statistics."""
    parsed = parse_stats(stats, allowed=ONE_MODEL_STATS + TWO_MODEL_STATS)
    text = write_plan(parsed, quiet, call.present(), short=True, **more)
    return call._replace(plan=read_plan(text))


def kept_itemsize(case: Case) -> int:
    """Bytes of a logit that is kept: those of fp32 where a gradient reads unrounded products."""
    names = tuple("jsd:0.5" if s == "jsd" else s for s in NEEDS[case.step]) or ("logp",)
    parsed = parse_stats(names, allowed=ONE_MODEL_STATS + TWO_MODEL_STATS)
    short = case.torch_dtype.itemsize == 2
    exact = read_plan(write_plan(parsed, frozenset(), ("targets",), short=short)).exact
    return 4 if exact else case.torch_dtype.itemsize


def kept_share(backend: str, budget: int | None, case: Case) -> float:
    """Share of the scored rows whose logits fit the memory budget."""
    if budget is None:
        budget = memory.default_budget(torch.device("cpu" if backend == "cpu" else "cuda:0"))
    per_row = case.backward_heads * case.shape.V * kept_itemsize(case)
    return min(case.scored, budget // per_row) / case.scored


class TileSchedule(NamedTuple):
    """How a head op on a GPU goes through the logits."""

    tiles: int
    kept: float  # share of the logits that the backward reads as the forward left them


def schedule(
    case: Case, device_memory: int, budget: int | None, chunk: int, size: int
) -> TileSchedule:
    """On a GPU of that much memory, for chunks of `chunk` columns and `size` bytes of a logit in
    the tiles that live at once; budget None is the default."""
    defaults, v = memory.row("cuda", device_memory), case.shape.V
    tiling = make_tiling(case.scored, v, size, chunk, defaults.tiles)
    steps = [step for v0 in tiling.tiles() for step in tiling.steps(v0)]
    heads, itemsize = case.backward_heads, kept_itemsize(case)
    budget = defaults.budget if budget is None else budget
    rows = rows_kept(case.scored, v, heads * itemsize, budget, torch.device("cuda"))
    cache = Kept(tiling, heads, torch.empty(heads * rows * v, device="meta"))
    kept = sum(step.m * step.w for step in steps if cache.place(step))
    return TileSchedule(len(steps), kept / (case.scored * v))


def tile_units(case: Case, backend: str) -> tuple[int, int]:
    """(columns of a chunk, bytes of a logit in all tiles that live at once) of the kernels here."""
    names = NEEDS[case.step]
    model = Model(*(torch.empty(n, 1, dtype=case.torch_dtype) for n in (1, case.shape.V)))
    ref = model if case.models == 2 else None
    call = HeadCall(model, ref, None, torch.zeros(1).long(), None, None, None, -100, NO_PLAN)
    call = _plan(names, frozenset(), call, frozen=case.frozen)
    options = tuple(LogitOptions.of(x, call.fold_dtype) for x in call.models)
    sweep = Sweep(call, call.targets, options)
    return _kernels_of(backend).chunk_columns(sweep), tile_itemsize(sweep)


def cpu_epilogue(rows: int, columns: int, repeats: int) -> tuple[list[float], str]:
    """(ns per logit of the fold, with entropy, of the gradient, with entropy; instruction set).

    Raises:
        ImportError: the native library is not there.
    """
    from prefkern.backends import cpu

    if reason := cpu.load_error():
        raise ImportError(f"backend 'cpu' is off: {reason}")
    found = torch.ops.prefkern_native.bench_epilogue(torch.empty(0), rows, columns, repeats)
    return found.tolist(), cpu.isa()


# ---- which kernels ran ---------------------------------------------------------------------------
def launched(backend: str) -> dict[str, int] | None:
    """Kernel -> launches in this process so far, under the names of prefkern/cuda_ran_on.json.

    A backend module tells by a function `seen_kernels() -> Mapping[str, int]`. None where it has
    none: then nothing may be said, and nothing is recorded, about what a run has launched.
    """
    seen = getattr(choice.load_backend(backend), "seen_kernels", None)
    return None if seen is None else dict(seen())


def newly_launched(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[str]]:
    """Backend -> kernels launched between two calls of `launched` (None is left out)."""
    return {
        name: sorted(k for k, n in now.items() if n > (before.get(name) or {}).get(k, 0))
        for name, now in after.items()
        if now is not None
    }


# ---- the kernels of a tile -----------------------------------------------------------------------
class Kernel(NamedTuple):
    """One kernel as a head op launches it; names and bytes are those of results/counts.csv."""

    name: str
    stats: tuple[str, ...]
    what: str  # fold, gradient, frozen, factor
    quiet: frozenset[str] = frozenset()  # without gradient: the fold writes a rounded tile, kept


TDPO = ("logp", "ref_logp", "fkl")
KERNELS = (
    Kernel("fold_one_small", ("logp",), "fold"),
    Kernel("fold_one", ("logp", "ent"), "fold"),
    Kernel("fold_one keeping", ("logp", "ent"), "fold", frozenset({"ent"})),
    Kernel("fold_two_small", TDPO, "fold"),
    Kernel("fold_two_small keeping", TDPO, "fold", frozenset({"fkl"})),
    Kernel("gradient_one_small", ("logp",), "gradient"),
    Kernel("gradient_one", ("logp", "ent"), "gradient"),
    Kernel("gradient_two_small", TDPO, "gradient"),
    Kernel("fold_frozen", ("logp",), "frozen"),
    Kernel("frozen_factors", ("logp",), "factor"),
)


def _kernels_of(backend: str) -> Any:
    if backend == "triton":
        from prefkern.kernels.epilogue import KERNELS as found
    else:
        from prefkern.backends.cuda import KERNEL_SET as found  # type: ignore[assignment]
    return found


def _sweep(kernel: Kernel, m: int, w: int, device: str, g: torch.Generator) -> Sweep:
    """A bfloat16 call of m rows over w columns, without the operands of its products."""
    model = Model(
        hidden=torch.empty(m, 1, dtype=torch.bfloat16, device=device),
        weight=torch.empty(w, 1, dtype=torch.bfloat16, device=device),
    )
    targets = torch.randint(0, w, (m,), generator=g, device=device)
    ref = model if kernel.stats == TDPO else None
    call = HeadCall(model, ref, None, targets, None, None, None, -100, NO_PLAN)
    call = _plan(kernel.stats, kernel.quiet, call, frozen=kernel.what in ("frozen", "factor"))
    return Sweep(call, targets, tuple(LogitOptions.of(x, call.fold_dtype) for x in call.models))


def kernel_call(kernel: Kernel, backend: str, m: int, w: int, device: str) -> Call:
    """A launch on one bfloat16 tile [m, w], inputs ready and output reused."""
    kernels = _kernels_of(backend)
    g = torch.Generator(device).manual_seed(0)
    sweep = _sweep(kernel, m, w, device, g)
    call = sweep.call

    def draw() -> Tensor:
        x = torch.empty(m, w, device=device, dtype=torch.float32).normal_(generator=g)
        return (2 * x).to(sweep.tile_dtype)

    out = torch.empty(m, w, dtype=call.working, device=device)
    if kernel.what in ("fold", "frozen"):
        tile = ProductTile(0, 0, tuple(draw() for _ in call.models))
        shape = (sweep.fields, -(-w // kernels.chunk_columns(sweep)), m)
        fields = torch.empty(shape, dtype=call.fold_dtype, device=device)
        at = torch.zeros((len(tables.AT), m), dtype=torch.float64, device=device)
        if kernel.what == "frozen":  # maxima at rest: no sum is moved
            maxima, totals = (
                torch.full((2, m), 99.0, device=device),
                torch.zeros(1, m, 1, device=device),
            )
            sums = FrozenSums(("mass",), totals, maxima, started=True)
            return lambda: kernels.fold_frozen(sweep, tile, fields, at, sums, out)
        return lambda: kernels.fold(sweep, tile, fields, at, out if sweep.rounded else None)
    tile = ProductTile(0, 0, tuple(draw() for _ in range(sweep.backward_models)))
    if kernel.what == "factor":
        maxima = torch.full((2, m), 8.0, device=device)
        return lambda: kernels.factor(sweep, tile, maxima, "mass", out)
    d_out = torch.empty(len(kernel.stats), m, device=device).normal_(generator=g)
    saved = torch.full((call.plan.saved_rows, m), 12.0, dtype=torch.float64, device=device)
    coefficients = kernels.arithmetic.pull(call, d_out, d_out.abs(), saved)
    return lambda: kernels.gradient(sweep, tile, coefficients, out)


# ---- ranked lists --------------------------------------------------------------------------------


def ragged(groups: int, longest: int, fixed: bool, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [S], labels [S], cu_groups [G+1]) on the device; 0 in the offsets first."""
    g = torch.Generator().manual_seed(groups)
    sizes = torch.randint(2, longest + 1, (groups,), generator=g)
    if fixed:
        sizes[:] = longest
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]).int()
    total = int(offsets[-1])
    scores = torch.randn(total, generator=g)
    labels = torch.randint(0, 5, (total,), generator=g).float()
    return scores.to(device), labels.to(device), offsets.to(device)


def padded_pairs(scores: Tensor, labels: Tensor) -> Tensor:
    """Logistic pair loss [G] of scores [G, K] over strictly ordered pairs, [G, K, K] at once."""
    gap = scores[:, :, None] - scores[:, None, :]
    above = labels[:, :, None] > labels[:, None, :]
    loss = torch.nn.functional.softplus(-gap) * above
    return loss.sum((1, 2)) / above.sum((1, 2)).clamp(min=1)


def list_calls(groups: int, small: int, device: str) -> Iterator[tuple[str, str, dict[str, Call]]]:
    """(backend or "eager", family, calls): `kernel` forms value and gradient, `autograd` is the op
    with its backward; `groups` lists of 16 items, `small` ragged lists of up to 64."""
    scores, labels, offsets = ragged(groups, 16, True, device)
    leaf = scores.reshape(groups, 16).clone().requires_grad_(True)
    grid = labels.reshape(groups, 16)

    def eager() -> object:
        return torch.autograd.grad(padded_pairs(leaf, grid).sum(), leaf)

    yield "eager", "pair", {"autograd": eager}
    few = ragged(small, 64, False, device)
    for backend in ("triton", "cuda"):
        for family in list_options.FAMILIES:
            if reasons(backend, "list_rank", device, torch.float32):
                continue
            options = {"family": family, "backend": backend}
            calls: dict[str, Call] = {}
            for what, given in (("", (scores, labels, offsets)), (" small", few)):
                own = given[0].clone().requires_grad_(True)

                def forward(given=given, options=options) -> object:
                    with torch.no_grad():
                        return list_rank(*given, **options)

                def both(own=own, given=given, options=options) -> object:
                    return torch.autograd.grad(list_rank(own, *given[1:], **options).sum(), own)

                calls |= {f"kernel{what}": forward, f"autograd{what}": both}
            yield backend, family, calls


def measure_lists(device: Cpu, calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Microseconds of each call: replayed, and with host time where a user's call has it."""
    seconds = {name: device.replayed(call, rounds=rounds) for name, call in calls.items()}
    found = {f"us_{name}": 1e6 * value for name, value in seconds.items()}
    if "autograd" in calls:
        found["us_autograd with host"] = 1e6 * device.seconds(calls["autograd"])
    return found
