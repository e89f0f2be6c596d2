"""Single kernels on a GPU: bandwidth of the epilogues, times of the ranking kernels.

Epilogues are timed through logits_logps on a tile [4096, 32768]: the same kernels that the head ops
run on their tiles. Times are of replayed CUDA graphs, so that no launch time is in them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern.backends import choice
from prefkern.backends.contract import Problem
from prefkern.ops.list_rank import list_rank

from . import timing

ROWS, COLUMNS = 4096, 32768
EPILOGUES = (
    ("logp",),
    ("logp", "ent"),
    ("logp", "ent", "col", "top1", "zmean"),
    ("logp", "ref_logp", "fkl"),
    ("logp", "ent", "fkl"),
    ("logp", "ref_logp", "fkl", "rkl"),
    ("logp", "jsd:0.5"),
    ("logp", "tv"),
    ("logp", "alpha:0.5"),
)
SECOND_SWEEP = ("jsd", "tv", "bkl")
TWO_MODELS = ("ref_logp", "fkl", "rkl", *SECOND_SWEEP, "alpha", "renyi", "mix", "ev")
LIST_FAMILIES = ("pair", "hinge", "plackett_luce", "softmax", "pro", "nca")


def names(stats: tuple[str, ...]) -> set[str]:
    return {s.partition(":")[0] for s in stats}


def measure_epilogues(dtypes: tuple[torch.dtype, ...], rows: int, columns: int) -> list[dict]:
    """Percent of the measured copy bandwidth of every epilogue, forward and backward."""
    copy = timing.copy_bandwidth()
    found: list[dict] = [{"kernel": "copy", "tb_per_s": copy / 1e12}]
    g = torch.Generator("cuda").manual_seed(0)
    targets = torch.randint(0, columns, (rows,), generator=g, device="cuda")
    for dtype in dtypes:
        z = (2 * torch.randn(rows, columns, generator=g, device="cuda")).to(dtype)
        zr = (z.float() + 0.1 * torch.randn(rows, columns, generator=g, device="cuda")).to(dtype)
        for backend in ("triton", "cuda"):
            problem = Problem("logits_logps", "cuda", dtype, None, ("logp",), rows, columns)
            if reasons := choice.unsupported(backend, problem):
                found.append({"backend": backend, "status": "; ".join(reasons)})
                continue
            module = choice.load_backend(backend)
            for stats in EPILOGUES:
                two = bool(names(stats).intersection(TWO_MODELS))
                found.append(
                    epilogue_row(module, stats, z, zr if two else None, targets, copy)
                    | {"backend": backend, "dtype": str(dtype).removeprefix("torch.")}
                )
    return found


def epilogue_row(
    module, stats: tuple[str, ...], z: Tensor, zr: Tensor | None, targets: Tensor, copy: float
) -> dict:
    def forward() -> tuple[Tensor, Tensor]:
        return module.logits_logps_fwd(z, targets, zr, 1.0, -100, stats)

    out, saved = forward()
    d_out = torch.randn_like(out)

    def backward() -> Tensor:
        return module.logits_logps_bwd(d_out, z, targets, zr, out, saved, 1.0, -100, stats)

    read = z.numel() * z.element_size() * (1 if zr is None else 2)
    sweeps = 2 if names(stats).intersection(SECOND_SWEEP) else 1
    forward_s, backward_s = timing.graph_seconds(forward), timing.graph_seconds(backward)
    wrote = z.numel() * z.element_size()
    return {
        "stats": ",".join(stats), "forward_us": 1e6 * forward_s, "backward_us": 1e6 * backward_s,
        "forward_percent_of_copy": 100 * sweeps * read / forward_s / copy,
        "backward_percent_of_copy": 100 * (read + wrote) / backward_s / copy,
    }  # fmt: skip


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


def measure_lists(groups: int, small_groups: int) -> list[dict]:
    found: list[dict] = []
    scores, labels, offsets = ragged(groups, 16, True, "cuda")
    leaf = scores.reshape(groups, 16).clone().requires_grad_(True)
    grid = labels.reshape(groups, 16)

    def eager() -> None:
        leaf.grad = None
        padded_pairs(leaf, grid).sum().backward()

    base = sorted(timing.interleaved({"eager": eager}, "cuda", 7)["eager"])[3]
    found.append({"kernel": "pair, padded eager", "groups": groups, "K": 16, "us": 1e6 * base})
    for backend in ("triton", "cuda"):
        for family in LIST_FAMILIES:
            problem = Problem("list_rank", "cuda", torch.float32, family=family)
            row = {"backend": backend, "family": family}
            if reasons := choice.unsupported(backend, problem):
                found.append(row | {"status": "; ".join(reasons)})
                continue
            large = list_seconds(backend, family, scores, labels, offsets)
            ragged_64 = ragged(small_groups, 64, False, "cuda")
            small = list_seconds(backend, family, *ragged_64)
            row |= {
                "groups": groups, "K": 16, "us_kernel": 1e6 * large[0],
                "us_autograd": 1e6 * large[1], "small_groups": small_groups,
                "us_kernel_small": 1e6 * small[0], "us_autograd_small": 1e6 * small[1],
            }  # fmt: skip
            if family == "pair":
                row["eager_over_autograd"] = base / large[1]
            found.append(row)
    return found


def list_seconds(
    backend: str, family: str, scores: Tensor, labels: Tensor, offsets: Tensor
) -> tuple[float, float]:
    """(kernel, through autograd) of value and gradient."""
    leaf = scores.clone().requires_grad_(True)

    def through_autograd() -> None:
        leaf.grad = None
        list_rank(leaf, labels, offsets, family=family, backend=backend).sum().backward()

    def forward_only() -> None:
        with torch.no_grad():
            list_rank(scores, labels, offsets, family=family, backend=backend)

    taken = sorted(timing.interleaved({"autograd": through_autograd}, "cuda", 15)["autograd"])
    return timing.graph_seconds(forward_only), taken[7]
