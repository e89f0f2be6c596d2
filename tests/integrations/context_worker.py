"""Ranks that hold every second part of each sequence."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import prefkern
from prefkern import losses
from prefkern.integrations.context_parallel import reduce_sequences
from prefkern.objective.segments import sequence_boundaries, sequence_stats, split_rows

V, D, B, T = 37, 8, 6, 12


def data() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden, ref = torch.randn(2, B, T, D, dtype=torch.float64).unbind(0)
    head, ref_head = 0.5 * torch.randn(2, V, D, dtype=torch.float64)
    targets = torch.randint(V, (B, T))
    targets[:, :3] = -100
    targets[1, 7:] = -100
    return hidden, head, targets, ref, ref_head


def step(tensors: tuple[Tensor, ...], group=None, gradients: str | None = None) -> tuple:
    hidden, head, targets, ref, ref_head = tensors
    tokens = prefkern.linear_divergence(
        hidden, head, targets, ref, ref_head, stats=("logp", "ref_logp", "fkl")
    )
    seq = sequence_stats(tokens, targets, sequence_boundaries(targets, None))
    if gradients is not None:
        seq = reduce_sequences(seq, group, gradients=gradients)
    chosen, rejected = split_rows(seq, 2, "pairs", ("chosen", "rejected"))
    assert chosen.length is not None
    loss = losses.tdpo2(chosen, rejected, beta=0.3).mean() + losses.simpo(chosen, rejected).mean()
    return loss, chosen.length


def reduced() -> None:
    tensors = data()
    tensors[1].requires_grad_()
    want, lengths = step(tensors)
    want.backward()
    gradient = tensors[1].grad
    rank, world = dist.get_rank(), dist.get_world_size()
    for gradients in ("mean", "sum"):
        hidden, head, targets, ref, ref_head = data()
        head.requires_grad_()
        part = slice(rank, None, world)  # of the tokens, already shifted
        own = (hidden[:, part], head, targets[:, part], ref[:, part], ref_head)
        loss, found = step(own, dist.group.WORLD, gradients)
        assert abs(loss - want) < 1e-12 and torch.equal(found, lengths)
        loss.backward()
        dist.all_reduce(head.grad)
        total = head.grad / (world if gradients == "mean" else 1)
        assert (total - gradient).abs().max() < 1e-12
    every = [None] * world
    dist.all_gather_object(every, float(loss))
    assert len(set(every)) == 1
