"""Every kernel once on small ragged inputs: what a memory checker is run over.

`compute-sanitizer --tool memcheck python -m benchmarks.device.small cuda`
"""

from __future__ import annotations

import sys

import torch

import prefkern
from prefkern.backends import choice
from prefkern.backends.contract import Problem
from prefkern.ops.list_rank import list_rank
from prefkern.ops.segment_sum import segment_sum
from prefkern.stats import ONE_MODEL_STATS

TWO_MODEL = (
    "logp", "ref_logp", "ref_lse", "fkl", "rkl", "jsd:0.3", "alpha:0.4", "renyi:0.6", "tv",
    "bkl:3", "mix:0.25", "ev",
)  # fmt: skip
LIST_FAMILIES = ("pair", "hinge", "plackett_luce", "softmax", "pro", "nca")


def run(backend: str, device: str = "cuda") -> list[str]:
    """Names of the ops that ran, forward and backward."""
    ran = []
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    targets = torch.randint(0, 131, (37,), generator=g)
    targets[::5] = -100
    targets = targets.to(device)

    def serves(op: str, dtype: torch.dtype, family: str | None = None) -> bool:
        return not choice.unsupported(backend, Problem(op, device, dtype, family=family))

    # The interpreter takes seconds for what a GPU does at once: one dtype and budget there.
    gpu = device == "cuda"
    for dtype in (torch.bfloat16, torch.float32) if gpu else (torch.bfloat16,):
        h, rh = (draw(37, 24, dtype=dtype).requires_grad_(i == 0) for i in range(2))
        w, rw = (draw(131, 24, dtype=dtype).requires_grad_(i == 0) for i in range(2))
        for budget in (0, None) if gpu else (None,):
            options = {"backend": backend, "memory_budget": budget}
            if serves("linear_logps", dtype):
                found = prefkern.linear_logps(h, w, targets, stats=ONE_MODEL_STATS, **options)
                (found.logp + found.ent + found.col).sum().backward()
                ran.append("linear_logps")
            if serves("linear_divergence", dtype):
                found = prefkern.linear_divergence(
                    h, w, targets, rh, rw, stats=TWO_MODEL, values=draw(131), **options
                )
                sum(getattr(found, s.partition(":")[0]).sum() for s in TWO_MODEL).backward()
                ran.append("linear_divergence")
        if serves("logits_logps", dtype):
            z, zr = draw(37, 131, dtype=dtype).requires_grad_(True), draw(37, 131, dtype=dtype)
            found = prefkern.logits_logps(
                z, targets, ref_logits=zr, stats=("logp", "fkl", "tv"), backend=backend
            )
            (found.logp + found.fkl + found.tv).sum().backward()
            ran.append("logits_logps")
    offsets = torch.tensor([0, 0, 1, 6, 40, 97], dtype=torch.int32, device=device)
    scores, labels = draw(97).requires_grad_(True), draw(97).round()
    for family in LIST_FAMILIES:
        if serves("list_rank", torch.float32, family):
            list_rank(scores, labels, offsets, family=family, backend=backend).sum().backward()
            ran.append(f"list_rank {family}")
    if serves("segment_sum", torch.float32):
        values, weights = draw(3, 97).requires_grad_(True), draw(97).requires_grad_(True)
        segment_sum(values, offsets, weights=weights, backend=backend).sum().backward()
        ran.append("segment_sum")
    if device == "cuda":
        torch.cuda.synchronize()
    return ran


if __name__ == "__main__":
    print("\n".join(run(*sys.argv[1:])))
