"""What one step on a GPU costs its host, without a GPU: kernels beside products, and time.

    python -m benchmarks.host_step

The CUDA library's ops and the matrix products are replaced by functions that do nothing, so that
all of Python, dispatch and autograd is left, on CPU tensors of a few rows. Each dispatched operator
that is no view and no allocation is a kernel on a GPU. Time is that of the process, the least of
many steps; launching comes on top, a few microseconds for each kernel and product.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import prefkern
from prefkern.backends import cuda, tables
from prefkern.backends.contract import HeadCall, Model
from prefkern.backends.native import NativeArithmetic
from prefkern.backends.plan import NO_PLAN, read_plan, write_plan
from prefkern.backends.tiled import backward, factors, tiles
from prefkern.ops import head_op
from prefkern.ops.scored import scored_rows
from prefkern.stats import ONE_MODEL_STATS, TWO_MODEL_STATS, parse_stats

# Steps of results/counts.csv: statistics, frozen head
STEPS = {
    "logp": (("logp",), False),
    "ent": (("logp", "ent"), False),
    "tdpo": (("logp", "ref_logp", "fkl"), False),
    "frozen": (("logp",), True),
}
N, SCORED, V, D = 16, 12, 8192, 8
# Operators that start no kernel: views, and memory that nobody fills
FREE = frozenset((
    "view", "slice", "select", "t", "transpose", "unsqueeze", "expand", "detach", "as_strided",
    "alias", "split", "unbind", "reshape", "squeeze", "permute", "empty", "empty_like",
    "empty_strided", "new_empty", "_unsafe_view", "split_with_sizes",
))  # fmt: skip


def _nothing(*_: object, **__: object) -> None:
    pass


def _merge(fields: Tensor, *_: object) -> Tensor:
    return fields.new_empty((len(tables.FIELDS), fields.shape[2]), dtype=torch.float64)


def _finish(sums: Tensor, *given: object) -> tuple[Tensor, Tensor]:
    plan = read_plan(given[8])  # type: ignore[arg-type]
    m = sums.shape[1]
    out = sums.new_empty((len(plan.stats), m), dtype=torch.float32)
    return out, sums.new_empty((plan.saved_rows, m))


def _pull(d_out: Tensor, *_: object) -> Tensor:
    return d_out.new_empty((len(tables.COEFFICIENTS), d_out.shape[1]))


@contextlib.contextmanager
def stubbed(rows_of_a_kernel: int = 1) -> Iterator[Counter[str]]:
    """The cuda backend on CPU tensors without its kernels, without products and without what is
    checked on CPUs alone; counts what would be launched. A frozen head's one kernel is taken from
    `rows_of_a_kernel` rows on."""
    launched: Counter[str] = Counter()

    def noted(name: str, function):
        def run(*given, **more):
            launched[name] += 1
            return function(*given, **more)

        return run

    functions = {"merge": _merge, "finish": _finish, "pull": _pull}
    kernels = ("fold", "fold_frozen", "factor", "raise_rows", "gradient")
    ops = SimpleNamespace(
        **{name: noted(name, functions.get(name, _nothing)) for name in (*kernels, *functions)}
    )
    arithmetic, product = NativeArithmetic(lambda: ops), noted("product", _nothing)
    with contextlib.ExitStack() as undo:
        for where, name, value in (
            (cuda, "_ops", lambda: ops),
            (cuda, "arithmetic", arithmetic),
            (cuda.KERNEL_SET, "arithmetic", arithmetic),
            (cuda.KERNEL_SET, "ROWS", rows_of_a_kernel),
            (cuda, "unsupported", cuda.unfit),
            (tiles, "product", product),
            (tiles, "add_product", product),
            (factors, "add_product", product),
            (backward, "product", product),
            (backward, "add_product", product),
            (head_op, "_check_labels", _nothing),
        ):
            undo.enter_context(mock.patch.object(where, name, value))
        yield launched


class Dispatches(TorchDispatchMode):
    """Counts operators that start a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if name not in FREE:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def _call(name: str) -> HeadCall:
    """A record of bfloat16 operands with its list of scored rows still to be made."""
    stats, frozen = STEPS[name]

    def model() -> Model:
        return Model(torch.zeros(N, D, dtype=torch.bfloat16), weight)

    weight = torch.zeros(V, D, dtype=torch.bfloat16)
    ref = model() if "ref_logp" in stats else None
    targets = torch.zeros(N, dtype=torch.int64)
    call = HeadCall(model(), ref, None, targets, targets[:SCORED], None, None, -100, NO_PLAN)
    parsed = parse_stats(stats, allowed=ONE_MODEL_STATS + TWO_MODEL_STATS)
    text = write_plan(parsed, frozenset(), call.present(), short=True, frozen=frozen)
    return call._replace(plan=read_plan(text))


def kernels_beside_the_products(
    name: str, rows_of_a_kernel: int = 1
) -> tuple[Counter[str], Counter[str]]:
    """Of the forward of a step, which finds its scored rows, and of its backward: kernels."""
    call = _call(name)
    frozen = call.plan.frozen
    found = []
    with stubbed(rows_of_a_kernel) as launched, torch.no_grad():
        with Dispatches() as log:
            rows = scored_rows(call.targets, call.ignore_index, SCORED)
            tensors, numbers = call._replace(rows=rows).pack()
            text, kept = call.plan.text, 0 if frozen else SCORED
            out = head_op._forward(tensors, numbers, text, -100, kept, SCORED, "cuda")
        found.append(log.found + launched)
        launched.clear()
        needed = "hidden" if frozen else "hidden,weight"
        with Dispatches() as log:
            head_op._backward(out[0].clone(), *out, tensors, numbers, text, -100, needed, "cuda")
        log.found["clone"] -= 1  # the gradient that autograd would have made
        found.append(log.found + launched)
    for counts in found:
        del counts["product"]
    return found[0], found[1]


def host_seconds(name: str, repeats: int = 300) -> float:
    """Of forward and backward by the public op."""
    stats, frozen = STEPS[name]
    hidden = torch.zeros(N, D, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=not frozen)
    targets, up = torch.zeros(N, dtype=torch.int64), torch.ones(N)
    more = {"stats": stats, "backend": "cuda", "num_scored": N}

    def step() -> None:
        if "ref_logp" in stats:
            ref = hidden.detach()
            found = prefkern.linear_divergence(hidden, weight, targets, ref, **more)
        else:
            found = prefkern.linear_logps(hidden, weight, targets, **more)
        torch.autograd.backward([found.logp], [up])

    least = float("inf")
    with stubbed():
        for _ in range(repeats):
            start = time.process_time()
            step()
            least = min(least, time.process_time() - start)
    return least


def main() -> None:
    torch.set_num_threads(1)
    for name in STEPS:
        forward, backward = (sum(x.values()) for x in kernels_beside_the_products(name))
        print(
            f"{name}: {forward} + {backward} kernels beside the products, "
            f"{1e6 * host_seconds(name):.0f} us of host time"
        )


if __name__ == "__main__":
    main()
