"""Ranks of test_traffic.py: what they hand to collectives beside the account on paper."""

from __future__ import annotations

from collections import Counter

import bench_package  # noqa: F401
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import prefkern
from benchmarks.cluster import Unit
from benchmarks.sharded_call import Call
from benchmarks.traffic import traffic
from prefkern import Head, Shard

BF16, FP32 = torch.bfloat16, torch.float32
CALLS = (
    Call(("logp",), 6, 2500, 16, 4, itemsize=4),
    Call(("logp",), 6, 2500, 16, 4, itemsize=2),
    Call(("logp", "ref_logp", "fkl"), 6, 2501, 16, 4, ref_D=8, itemsize=4),
    Call(("logp", "ref_logp"), 6, 2500, 16, 4, ref_D=8, itemsize=2),
    Call(("logp", "jsd:0.5", "tv"), 6, 2500, 16, 4, ref_D=8, itemsize=4),
    Call(("logp", "bkl:3"), 6, 2500, 16, 4, ref_D=8, itemsize=4),
    Call(("logp", "ent", "top1"), 6, 2500, 16, 4, low_rank=3, itemsize=4),
    Call(("logp", "fkl"), 6, 2500, 16, 4, ref_D=8, itemsize=4, trained=False),
    Call(("logp", "fkl"), 6, 9000, 16, 4, ref_D=8, itemsize=4, tail=0.1),
    Call(("logp", "fkl"), 6, 2500, 16, 4, tokens="own", ref_D=8, low_rank=3, itemsize=4),
    Call(("logp", "ref_logp", "fkl"), 6, 2500, 16, 4, tokens="sequence", ref_D=8, itemsize=2),
    Call(("logp",), 6, 2500, 16, 4, tokens="own", itemsize=4),
)


def head_calls(backend: str) -> None:
    """Every collective of a call, in its order and with its bytes."""
    for call in CALLS:
        _head_call(call, backend)
    assert Call(("logp",), 6, 10**6, 16, 4).forward() == Call(("logp",), 6, 10, 16, 4).forward()


def _head_call(call: Call, backend: str) -> None:
    dtype = BF16 if call.itemsize == 2 else FP32
    rank, rows = dist.get_rank(), call.vocabulary
    start = min(rank * rows, call.V)
    here = min(rows, call.V - start)
    shard = Shard(call.tokens, dist.group.WORLD, start, call.V)

    def draw(*size: int, moves: bool = True) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype).requires_grad_(moves)

    low_rank = []
    if call.low_rank:
        low_rank = [(draw(call.n, call.low_rank), draw(here, call.low_rank, moves=call.trained))]
    head = Head(draw(here, call.D, moves=call.trained), low_rank=low_rank, shard=shard)
    hidden, targets = draw(call.n, call.D), torch.arange(call.n)
    options = {"stats": call.stats, "tail_mass": call.tail, "backend": backend}
    with traffic() as found:
        if call.ref_D:
            out = prefkern.linear_divergence(
                hidden, head, targets, draw(call.n, call.ref_D, moves=False),
                Head(draw(here, call.ref_D, moves=False), shard=shard), **options,
            )  # fmt: skip
        else:
            out = prefkern.linear_logps(hidden, head, targets, **options)
    wide = prefkern.backends.choice.load_backend(backend).FOLDS_WIDE
    call = call.__class__(**{**call.__dict__, "folds_wide": wide})
    assert found.calls == [(x.collective, x.size) for x in call.forward()], (call, found.calls)
    with traffic() as found:
        sum(
            x.float().sum() for x in out[: len(out)] if x is not None and x.requires_grad
        ).backward()
    assert found.calls == [(x.collective, x.size) for x in call.backward()], (call, found.calls)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + self.inner(x)


def sharded_units() -> None:
    """FSDP2's collectives of a step: trained and frozen units, fp32 and bf16 with fp32 sums."""
    world, width = dist.get_world_size(), 16
    mesh = init_device_mesh("cpu", (world,))
    for mixed in (False, True):
        policy = MixedPrecisionPolicy(BF16, FP32) if mixed else MixedPrecisionPolicy()
        for trained in (True, False):
            blocks = [_Block(width) for _ in range(3)]
            model = nn.Sequential(*blocks)
            for block in blocks[:-1]:
                block.requires_grad_(trained)
            for block in blocks:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            x = torch.randn(5, width, requires_grad=True)
            with traffic() as found:
                model(x).sum().backward()
            want: Counter[str] = Counter()
            for block in blocks:
                moves = next(block.parameters()).requires_grad
                unit = Unit(width * width, world, trained=moves, itemsize=2 if mixed else 4)
                for sent in unit.step():
                    want[sent.collective] += sent.size
            got: Counter[str] = Counter()
            for name, size in found.calls:
                got[name] += size
            assert got == want, (mixed, trained, found.calls, want)
